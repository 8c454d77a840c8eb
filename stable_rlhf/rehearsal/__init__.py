"""Rehearsal selection: embed the prompts, cluster them, keep the best answers of every cluster."""

from __future__ import annotations

from stable_rlhf.rehearsal.cluster import Clusters, cluster_embeddings
from stable_rlhf.rehearsal.embed import DEFAULT_EMBEDDING_MODEL, embed_texts, prompt_text, resolve_embedding_model
from stable_rlhf.rehearsal.select import CRITERIA, Selection, select_rehearsal, top_up

__all__ = [
    "CRITERIA",
    "DEFAULT_EMBEDDING_MODEL",
    "Clusters",
    "Selection",
    "cluster_embeddings",
    "embed_texts",
    "prompt_text",
    "resolve_embedding_model",
    "select_rehearsal",
    "top_up",
]
