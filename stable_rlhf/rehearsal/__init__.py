"""Rehearsal selection: embed the prompts, cluster them, keep the best answers of every cluster."""

from __future__ import annotations

from stable_rlhf.rehearsal.cluster import Clusters, cluster_embeddings
from stable_rlhf.rehearsal.embed import DEFAULT_EMBEDDING_MODEL, embed_texts, prompt_text, resolve_embedding_model
from stable_rlhf.rehearsal.pipeline import needs_embeddings, read_candidates, select_file, select_to_folder
from stable_rlhf.rehearsal.report import render_selection
from stable_rlhf.rehearsal.select import CRITERIA, Selection, choose, select_rehearsal, top_up
from stable_rlhf.rehearsal.store import Embeddings, embed_to_folder, open_embeddings
from stable_rlhf.rehearsal.sweep import skill_purity, sweep_clusters

__all__ = [
    "CRITERIA",
    "DEFAULT_EMBEDDING_MODEL",
    "Clusters",
    "Embeddings",
    "Selection",
    "choose",
    "cluster_embeddings",
    "embed_texts",
    "embed_to_folder",
    "needs_embeddings",
    "open_embeddings",
    "prompt_text",
    "read_candidates",
    "render_selection",
    "resolve_embedding_model",
    "select_file",
    "select_rehearsal",
    "select_to_folder",
    "skill_purity",
    "sweep_clusters",
    "top_up",
]
