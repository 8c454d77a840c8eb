"""Embeddings on disk: made in shards that survive a kill, kept as one memory-mapped file with a manifest.

While it grows, a folder holds ``job.json`` (what is embedded, and how) and ``shards/``: one ``.npy`` a shard and, once
that is safely written, one ``.json`` with its checksum. Both are written to a temporary name and renamed, so what has
its final name is whole. The finished folder holds ``embeddings.npy`` in the order of the texts and ``manifest.json``.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from stable_rlhf.data.digest import file_digest
from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.data.records import DataError
from stable_rlhf.rehearsal.embed import cannot_load, checked_texts, load_encoder, resolve_embedding_model
from stable_rlhf.show.progress import Bar, progress, say
from stable_rlhf.system.locks import LOCK, FolderLock

Encoder = Callable[[list[str]], np.ndarray]
"""Texts to their embeddings, floating point [m, d]."""

FORMAT = 1
DTYPES = ("float32", "float16")
_TEXTS_PER_CALL = 512


@dataclass(frozen=True)
class Embeddings:
    """A finished folder of embeddings.

    array: float32 or float16 [n, d], a read-only memory map; row i belongs to text i of the input.
    manifest: model, revision, pooling, normalised, max_seq_length, dtype, rows, dimensions, key (digest of texts and
        settings), row_ids (the caller's names of the rows; null: they are the places in the input), checksum.
    """

    folder: Path
    array: np.ndarray
    manifest: dict[str, Any]


def open_embeddings(folder: str | os.PathLike[str], *, verify: bool = False) -> Embeddings:
    """The embeddings that `embed_to_folder` wrote; `verify` reads the whole file and compares its checksum.

    Raises:
        ValueError: the folder is not finished, not of this format, or its file does not fit its manifest.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except DataError as error:
        if not path.exists():
            state = "holds an unfinished job" if (folder / "job.json").exists() else "holds no embeddings"
            raise ValueError(f"{folder}: {state}; embed_to_folder makes or finishes them") from None
        raise ValueError(f"{path}: damaged ({error}); delete the folder and embed again") from None
    if manifest.get("format") != FORMAT or not {"rows", "dimensions", "dtype", "checksum"} <= manifest.keys():
        raise ValueError(f"{path}: not a manifest of format {FORMAT}")
    data = folder / "embeddings.npy"
    try:
        array = np.lib.format.open_memmap(data, mode="r")  # np.load would take an archive or a pickle
    except Exception as error:  # numpy reads the header as Python, and fails with whatever that raises
        raise ValueError(f"{data}: cannot be opened ({error}); delete the folder and embed again") from None
    expected = (manifest["rows"], manifest["dimensions"]), manifest["dtype"]
    if (array.shape, str(array.dtype)) != expected:
        raise ValueError(f"{data}: {array.dtype} {list(array.shape)} instead of {expected[1]} {list(expected[0])}")
    if verify and file_digest(data) != manifest["checksum"]:
        raise ValueError(f"{data}: its checksum is not the manifest's; delete the folder and embed again")
    return Embeddings(folder, array, manifest)


def embedding_key(texts: Sequence[str], settings: dict[str, Any], row_ids: Sequence[str] | None = None) -> str:
    """A digest of what the embeddings depend on: the texts in their order, the row ids and the settings."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for part in (texts, row_ids or ()):
        for text in part:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"\xff")
    return digest.hexdigest()


def embed_to_folder(
    texts: Sequence[str],
    folder: str | os.PathLike[str],
    model: str,
    *,
    row_ids: Sequence[str] | None = None,
    batch_size: int = 64,
    max_seq_length: int | None = None,
    normalize: bool = True,
    pooling: str = "auto",
    device: str | None = None,
    compute_dtype: str = "auto",
    dtype: str = "float32",
    shard_rows: int = 4096,
    encoder: Encoder | None = None,
) -> Embeddings:
    """Embed `texts` into `folder`, or finish what an earlier call began there; nothing finished is done again.

    Kill it at any moment and call it again with the same arguments: shards that are done stay, the result is the same
    as without the kill. A folder made from other texts, another model or other settings is refused. Under torchrun or
    deepspeed the ranks share the shards out, and rank 0 puts the file together. A finished folder is just opened.

    texts, model, batch_size, max_seq_length, normalize, pooling, device, compute_dtype: as in `embed_texts`. Texts are
        sorted by length over the whole input, longest first: what does not fit into memory fails at once.
    row_ids: a name of each row, kept in the manifest.
    dtype: of the file, "float32" or "float16" (half the disk; unit vectors lose about 3e-4 of their length).
    shard_rows: texts of one shard, the most work that a kill can cost on each rank. An unfinished folder keeps its own.
    encoder: used instead of loading `model`, which then only names it. Called with up to 512 texts, longest first.

    Raises:
        ValueError: bad arguments; a folder with something else in it, or in use by another process; an encoder whose
            result has the wrong shape or values that are not finite.
    """
    checked_texts(texts)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
    if row_ids is not None and len(row_ids) != len(texts):
        raise ValueError(f"row_ids: {len(row_ids)} names for {len(texts)} texts")
    ranks = _Ranks()
    folder = Path(folder)
    name = model if encoder is not None else resolve_embedding_model(model)
    settings = {
        "model": _portable_name(name, model), "revision": None if encoder is not None else _revision(name),
        "pooling": pooling, "normalized": normalize, "max_seq_length": max_seq_length, "dtype": dtype,
    }  # fmt: skip
    job = {"format": FORMAT, "key": embedding_key(texts, settings, row_ids), "rows": len(texts), **settings}

    with ExitStack() as held:
        with ranks.together():
            if ranks.rank == 0:
                held.enter_context(_locked(folder))
                _begin(folder, {**job, "shard_rows": shard_rows})
        if not (folder / "manifest.json").exists():
            shards = _shards(texts, read_json(folder / "job.json")["shard_rows"])
            with ranks.together():  # all look before anyone writes
                missing = [k for k in range(len(shards)) if not _shard_is_done(folder, k, len(shards[k]))]
            with ranks.together():
                if missing and encoder is None:
                    encoder = load_encoder(
                        name, batch_size=batch_size, max_seq_length=max_seq_length, normalize=normalize,
                        pooling=pooling, device=device or ranks.device(), compute_dtype=compute_dtype,
                    )  # fmt: skip
                if len(missing) < len(shards):
                    say(f"  embeddings: {len(shards) - len(missing)} of {len(shards)} shards were done before")
                own_shards = missing[ranks.rank :: ranks.size]
                with progress("embedding", total=sum(len(shards[k]) for k in own_shards), unit="texts") as bar:
                    for k in own_shards:
                        assert encoder is not None
                        _write_shard(folder, k, _encoded(encoder, texts, shards[k], dtype, bar))
            with ranks.together():
                if ranks.rank == 0:
                    ids = None if row_ids is None else list(row_ids)
                    _assemble(folder, shards, {**job, "row_ids": ids}, dtype)
        with ranks.together():
            if ranks.rank == 0:
                _clean(folder)
        return open_embeddings(folder)


def _encoded(encoder: Encoder, texts: Sequence[str], places: np.ndarray, dtype: str, bar: Bar) -> np.ndarray:
    """The embeddings of the texts at `places`, asked for in parts so that progress shows."""
    parts = []
    for start in range(0, len(places), _TEXTS_PER_CALL):
        part = places[start : start + _TEXTS_PER_CALL]
        vectors = np.asarray(encoder([texts[i] for i in part]))
        if vectors.ndim != 2 or len(vectors) != len(part):
            raise ValueError(f"encoder: returned shape {list(vectors.shape)} for {len(part)} texts, not [texts, width]")
        with np.errstate(over="ignore"):  # found out below
            stored = vectors.astype(dtype)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            raise ValueError(f"encoder: the embedding of text {part[int(np.argmin(finite))]} is not finite in {dtype}")
        parts.append(stored)
        bar.advance(len(part))
    return np.concatenate(parts)


def _shards(texts: Sequence[str], shard_rows: int) -> list[np.ndarray]:
    """Places of the texts of each shard, longest texts first, ties in their order."""
    lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + shard_rows] for start in range(0, len(order), shard_rows)]


def _portable_name(resolved: str, given: str) -> str:
    """A local folder by its last name (its revision says what is in it), so that it may move; a hub name as it is."""
    return given if given.lower() == "minilm" else Path(resolved).name if Path(resolved).is_dir() else resolved


def _revision(name: str) -> str:
    """The commit of a hub model, or a digest of the files of a local folder."""
    folder = Path(name)
    if folder.is_dir():
        digest = hashlib.blake2b(digest_size=16)
        parts = (".json", ".safetensors", ".bin", ".txt", ".model")
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in parts):
            digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\n".encode())
        return f"files:{digest.hexdigest()}"
    from transformers import AutoConfig

    from stable_rlhf.models.checked import OWN_CODE_ALONE

    try:
        return str(AutoConfig.from_pretrained(name, **OWN_CODE_ALONE)._commit_hash)
    except OSError as error:
        raise cannot_load(name, error) from error


# Files


def _write(path: Path, write: Callable[[Any], None]) -> None:
    """The file whole or not at all: its name appears when its bytes are on the disk."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, lambda file: file.write(to_json(content, indent=1).encode() + b"\n"))


def _shard(folder: Path, k: int) -> tuple[Path, Path]:
    return folder / "shards" / f"{k:06d}.npy", folder / "shards" / f"{k:06d}.json"


def _write_shard(folder: Path, k: int, rows: np.ndarray) -> None:
    data, marker = _shard(folder, k)
    _write(data, lambda file: np.save(file, rows))
    _write_json(marker, {"rows": len(rows), "checksum": file_digest(data)})


def _shard_is_done(folder: Path, k: int, rows: int) -> bool:
    data, marker = _shard(folder, k)
    with suppress(DataError, KeyError, OSError):
        known = read_json(marker)
        if known["rows"] == rows and known["checksum"] == file_digest(data):
            return True
    if marker.exists():
        say(f"  embeddings: {data} does not fit its checksum, it is made again")
    return False


def _begin(folder: Path, job: dict[str, Any]) -> None:
    """Write ``job.json``, or find that the folder is of the same job; a ValueError says what is different."""
    for path in (folder / "manifest.json", folder / "job.json"):
        if not path.exists():
            continue
        try:
            known = read_json(path, "key", *(["shard_rows"] if path.name == "job.json" else []))
            key = known["key"]
            if path.name == "job.json" and not (type(known["shard_rows"]) is int and known["shard_rows"] > 0):
                raise DataError("shard_rows")
        except DataError:
            raise ValueError(f"{path}: damaged; delete the folder {folder} and embed again") from None
        if key != job["key"]:
            names = [k for k in job if k not in ("key", "shard_rows", "format") and known.get(k) != job[k]]
            what = [f"{k} {known.get(k)!r} -> {job[k]!r}" for k in names]
            raise ValueError(
                f"{folder} holds embeddings of another input ({', '.join(what) or 'other texts or row ids'}); "
                "choose another folder or delete this one"
            )
        (folder / "shards").mkdir(exist_ok=True)
        return
    strange = [path.name for path in folder.iterdir() if path.name != LOCK and path.suffix != ".part"]
    if strange:
        raise ValueError(f"{folder} is not empty ({sorted(strange)[0]}) and holds no embeddings; choose another folder")
    _write_json(folder / "job.json", job)
    (folder / "shards").mkdir(exist_ok=True)


def _assemble(folder: Path, shards: list[np.ndarray], job: dict[str, Any], dtype: str) -> None:
    """One file in the order of the texts, then the manifest: who finds a manifest finds a whole file."""
    n = job["rows"]
    d = np.load(_shard(folder, 0)[0], mmap_mode="r").shape[1]
    unfinished = folder / "embeddings.npy.part"
    whole = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=(n, d))
    with progress("putting shards together", total=n, unit="rows") as bar:
        for k, places in enumerate(shards):
            rows = np.load(_shard(folder, k)[0])
            if rows.shape[1] != d:
                raise ValueError(f"encoder: shard {k} has width {rows.shape[1]}, shard 0 has {d}")
            whole[places] = rows
            bar.advance(len(places))
    whole.flush()
    del whole
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(folder / "embeddings.npy")
    checksum = file_digest(folder / "embeddings.npy")
    _write_json(folder / "manifest.json", {**job, "dimensions": d, "checksum": checksum})


def _clean(folder: Path) -> None:
    """Take away what only an unfinished folder needs."""
    if (folder / "shards").is_dir():
        for path in (folder / "shards").iterdir():
            path.unlink()
        (folder / "shards").rmdir()
    for name in ("job.json", "embeddings.npy.part"):
        (folder / name).unlink(missing_ok=True)


def _locked(folder: Path) -> AbstractContextManager[FolderLock]:
    """The folder for this call alone, though another one of the same process asks for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made a folder: {error.strerror or error}") from error
    return FolderLock(folder)


def join_ranks() -> tuple[int, int]:
    """Rank and number of the launcher's processes, (0, 1) without one; they are joined by gloo where nobody did so yet.

    torch.distributed is touched only under a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(hours=6))  # the others wait while rank 0 selects
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size()


def _leave() -> None:
    """Ends gloo's threads before the process does: one that is torn down under them may abort."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class _Ranks:
    def __init__(self) -> None:
        self.rank, self.size = join_ranks()

    def device(self) -> str | None:
        """This rank's own GPU; None (the encoder's choice) without a launcher or a GPU."""
        if self.size == 1:
            return None
        import torch

        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave together, and all with an error where one has one: none waits for a rank that has gone."""
        if self.size == 1:
            yield
            return
        from stable_rlhf.ranks import together

        def words(error: Exception) -> str:
            return f"rank {self.rank} failed: {type(error).__name__}: {error}"

        with together(Exception, told_as=ValueError, words=words):
            yield
