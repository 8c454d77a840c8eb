"""The whole selection in one call: candidates in, a folder with D_R, figures and a report out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stable_rlhf.data.jsonl import to_json, write_jsonl
from stable_rlhf.data.readers import Columns, OnBadRow, Paths, read_demonstrations, read_scored, tell_skipped
from stable_rlhf.data.records import DataError, Demonstration
from stable_rlhf.rehearsal.cluster import Clusters, known_groups
from stable_rlhf.rehearsal.embed import DEFAULT_EMBEDDING_MODEL
from stable_rlhf.rehearsal.report import render_selection
from stable_rlhf.rehearsal.select import NO_TASK, Candidate, Selection, as_candidates, select_rehearsal, top_up
from stable_rlhf.rehearsal.store import embed_to_folder, embedding_key
from stable_rlhf.rehearsal.sweep import sweep_clusters
from stable_rlhf.show.page import write_html
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.system.extras import require

_CLUSTERING = ("method", "niter", "spherical", "init", "train_rows", "backend", "devices", "threads")
_NOT_IN_KEY = ("batch_size", "device", "shard_rows", "encoder")  # they do not say what the embeddings are

GroupBy = Literal["cluster", "task"]


def needs_embeddings(
    group_by: GroupBy, num_clusters: int, sweep: Sequence[int] = (), near_duplicate: float | None = None
) -> bool:
    """Whether a selection with these settings asks for embeddings: tasks, and one cluster, are known without."""
    return (group_by == "cluster" and num_clusters > 1) or bool(sweep) or near_duplicate is not None


def _known_groups(candidates: Sequence[Candidate], group_by: GroupBy, num_clusters: int) -> Clusters | None:
    """The groups that need no clustering; None where there is some to do."""
    if group_by == "task":
        tasks = [candidate.task for candidate in candidates]
        if candidates and set(tasks) == {NO_TASK}:
            raise ValueError("group_by: no candidate has a 'task' to be grouped by")
        return known_groups(tasks, "task")
    return known_groups([""] * len(candidates), "none") if num_clusters == 1 else None


def read_candidates(
    paths: Paths, *, on_bad_row: OnBadRow = "error", columns: Columns = None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Scored candidates and their scores, float64 [n], from JSON lines (docs/guide/data.md).

    Rows are demonstrations with a number `score`; `entropy`, `satisfaction` and `length` may stand beside it.
    `columns`: the files' names of columns by ours, where they are others: {"score": "helpfulness"}.

    Raises:
        DataError: as `read_demonstrations`, and for a row without a number as score (file and line named).
    """
    result = read_scored(paths, on_bad_row=on_bad_row, columns=columns)
    tell_skipped("candidates", result)
    rows = [{**row.meta, "prompt": row.prompt, "response": row.response, "task": row.task} for row in result.rows]
    return rows, np.array([row.meta["score"] for row in result.rows], dtype=np.float64)


def select_to_folder(
    candidates: Sequence[Mapping[str, Any] | Candidate],
    scores: Any,
    folder: str | os.PathLike[str],
    *,
    num_clusters: int,
    top_k: int,
    group_by: GroupBy = "cluster",
    embedding_model: str = DEFAULT_EMBEDDING_MODEL,
    embeddings_folder: str | os.PathLike[str] | None = None,
    embedding: Mapping[str, Any] | None = None,
    outside: Iterable[Mapping[str, Any] | Demonstration] = (),
    sweep: Sequence[int] = (),
    title: str = "Rehearsal selection",
    seed: int = 0,
    needed: bool = False,
    **selecting: Any,
) -> Selection:
    """Embed the prompts, cluster them, keep the best answers of every cluster, and write it all down in `folder`.

    `folder` gets ``rehearsal.jsonl.gz`` (D_R: the selected rows and `outside`, shuffled, each with its provenance),
    ``selection.json`` (all figures) and ``report.html`` (one page, self-contained).

    candidates, scores: as in `select_rehearsal`.
    group_by: what the best are kept of: each of `num_clusters` clusters of prompts, or each "task", as many of every
        one whatever the scorer likes. Embedded is only where it is needed (`needs_embeddings`).
    embedding_model: what `resolve_embedding_model` takes; embedding: further keywords of `embed_to_folder`.
    embeddings_folder: where embeddings are kept, in a folder for each input, so that a killed call goes on where it was
        and another selection from the same prompts embeds nothing; default ``folder/embeddings``.
    outside: rows of `read_demonstrations` or dicts to add to D_R (`top_up`).
    sweep: numbers of clusters to compare with each other on the report's chart (`sweep_clusters`).
    needed: raise a DataError where D_R would be empty, in place of a warning.
    selecting: further keywords of `select_rehearsal` and, through it, of `cluster_embeddings`.

    Under a launcher every rank makes the same selection from embeddings that the ranks shared out; rank 0 writes.
    """
    folder = Path(folder)
    candidates = as_candidates(candidates)
    groups, embeddings = _known_groups(candidates, group_by, num_clusters), None
    if needs_embeddings(group_by, num_clusters, sweep, selecting.get("near_duplicate")):
        texts = [candidate.text for candidate in candidates]
        chosen = {"model": embedding_model, **(embedding or {})}
        key = embedding_key(texts, {k: v for k, v in chosen.items() if k not in _NOT_IN_KEY})
        kept_in = Path(embeddings_folder) if embeddings_folder is not None else folder / "embeddings"
        embeddings = embed_to_folder(texts, kept_in / key[:12], embedding_model, **(embedding or {}))
    array = None if embeddings is None else embeddings.array
    clustering = {k: v for k, v in selecting.items() if k in _CLUSTERING}
    if groups is None:
        assert array is not None
        selection = select_rehearsal(
            candidates, scores, array, num_clusters=num_clusters, top_k=top_k, seed=seed, **selecting
        )
    else:
        choosing = {k: v for k, v in selecting.items() if k not in clustering}
        selection = select_rehearsal(candidates, scores, groups, top_k=top_k, seed=seed, embeddings=array, **choosing)
    rows = top_up(selection.rows, outside, seed=seed)
    if not selection.rows:
        given = [name for name in ("minimum", "maximum") if selection.settings[name]]
        limits = [f"select.{name} {selection.settings[name]}" for name in given]
        nothing = f"none of {len(candidates)} candidates is left by {' and '.join(limits)}"
        if needed and not rows:
            raise DataError(f"{nothing}, and there are no outside rows: nothing is left to rehearse")
        say(f"  WARNING: {nothing}: the rehearsal data are {len(rows)} outside rows")
    if is_main_process():
        swept = None
        if sweep and array is not None:
            allowed = np.ones(len(candidates), dtype=bool)
            allowed[selection.left_out[0]] = False
            swept = sweep_clusters(
                array, sweep, value=selection.value, budget=len(selection.rows), seed=seed, allowed=allowed,
                near_duplicate=selecting.get("near_duplicate"), **clustering,
            )  # fmt: skip
        write_jsonl(folder / "rehearsal.jsonl.gz", rows)
        manifest = None if embeddings is None else embeddings.manifest
        summary = {
            **selection.summary(),
            "embedding": manifest and {k: v for k, v in manifest.items() if k != "row_ids"},
        }
        if swept:
            summary["sweep"] = swept
        (folder / "selection.json").write_text(to_json(summary) + "\n", encoding="utf-8")
        page = render_selection(
            selection, array, title=title, embedding=manifest,
            outside=len(rows) - len(selection.rows), swept=swept, seed=seed,
        )  # fmt: skip
        write_html(folder / "report.html", page)
    return selection


def select_file(
    candidates: Paths,
    folder: str | os.PathLike[str],
    *,
    outside: Paths | None = None,
    on_bad_row: OnBadRow = "error",
    columns: Columns = None,
    **settings: Any,
) -> Selection:
    """`select_to_folder` from files: scored candidates and outside demonstrations, read as by `read_candidates`.

    select_file("scored.jsonl.gz", "out", num_clusters=100, top_k=20) is a whole selection.
    """
    require("select_file", "transformers", "safetensors", "matplotlib", "jinja2", "sklearn")
    rows, scores = read_candidates(candidates, on_bad_row=on_bad_row, columns=columns)
    added = []
    if outside:
        result = read_demonstrations(outside, on_bad_row=on_bad_row, columns=columns)
        tell_skipped("rehearsal data", result)
        added = result.rows
    return select_to_folder(rows, scores, folder, outside=added, **settings)
