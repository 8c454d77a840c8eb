"""Drawing what is broken: values, bytes and files, for as long as a budget lasts; how many of each kind were tried."""

from __future__ import annotations

import copy
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from stable_rlhf.show.progress import printable

BUDGET = float(os.environ.get("HOSTILE_BUDGET", "240"))  # seconds, over all kinds
KINDS = 8
tried: Counter[str] = Counter()

VALUES = st.one_of(
    st.sampled_from([
        None, True, False, 0, -1, 2**63, 10**400, 0.5, 1e308, -1e308, float("nan"), float("inf"), "", " ", "x" * 300,
        "\ud800", "\u2028\x00\x1b[31m", "../..", "ä" * 40, [], [[]], {}, {"": {}}, [None], [0, 0], {"role": "user"},
        [{"role": "user", "content": "q"}], [{"role": "system", "content": "s"}], ["a", "b"], "[" * 200,
    ]),
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.lists(st.integers(-2, 2), max_size=3),
)  # fmt: skip
SWAPS = [b"", b"null", b"[]", b"5", b"{}", b'"x"', b"\x00" * 64, b"\xff\xfe", b"{" * 5000, b"[" * 100_000, b"NaN",
         b"\xef\xbb\xbf{}", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\n\n", b"\x80\x04."]  # fmt: skip


@st.composite
def corruptions(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What happens to a file: cut, overwritten, lengthened, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "swap", "double", "json", "json", "json"]))
    where, noise = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=8))
    swap, change = draw(st.sampled_from(SWAPS)), draw(changes())

    def corrupt(content: bytes) -> bytes:
        at = int(where * len(content))
        if kind == "json":
            try:
                return json.dumps(change(json.loads(content))).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):
                pass  # it is no JSON: flip it
        if kind == "cut":
            return content[:at]
        if kind in ("flip", "json"):
            return content[:at] + noise + content[at + len(noise) :]
        if kind == "insert":
            return content[:at] + noise + content[at:]
        return swap if kind == "swap" else content + content

    return corrupt


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A change of one place of a JSON value: another value there, a name that is gone, added or written otherwise."""
    steps, what = draw(st.lists(st.floats(0, 0.999), max_size=4)), draw(st.sampled_from(["set", "set", "drop", "add"]))
    value = draw(VALUES)

    def change(given: Any) -> Any:
        found = copy.deepcopy(given)
        holder, key, place = None, None, found
        for step in steps or [0.0]:
            keys = (
                list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
            )
            if not keys:
                break
            holder, key = place, keys[int(step * len(keys))]
            place = holder[key]
        if holder is None:
            return value
        if what == "drop":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder["unknown"] = value
        else:
            holder[key] = value
        return found

    return change


def drawn(
    kind: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], *, seconds: float | None = None,
    examples: int = 0, shrink: bool = True,
) -> None:  # fmt: skip
    """``check`` on what ``strategy`` draws, for so many ``seconds`` or ``examples``; a failure is shown as small as it
    gets, where a try is quick."""
    ends = None if seconds is None else time.monotonic() + seconds
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    number = 0
    while number == 0 or (ends is not None and time.monotonic() < ends):

        @seed(number)
        @settings(
            max_examples=examples or (20 if shrink else 1), database=None, deadline=None, phases=phases,
            suppress_health_check=list(HealthCheck), derandomize=False,
        )  # fmt: skip
        @given(strategy)
        def once(case: Any) -> None:
            if ends is not None and time.monotonic() > ends:
                return
            tried[kind] += 1
            check(case)

        once()
        number += 1


def one_line(text: str, *names: str) -> None:
    """An error that the command line shows as one line, and that says what it is about."""
    text = printable(text, lines=False)
    assert 0 < len(text) < 3000 and not set(text) & set("\n\r\x1b"), text
    assert not names or any(name in text for name in names), (text, names)
