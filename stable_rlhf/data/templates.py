"""Chat templates are programs of other people: tried once within bounds before they meet any data, stopped at a row
that they make no end of, and told by their own words when they refuse one."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stable_rlhf.data.records import Message, RowError

# What trying a template may take: it renders in milliseconds and kilobytes.
_CPU_SECONDS, _BYTES, _SECONDS = 5, 1 << 30, 120
_ROW_SECONDS = 20.0  # of one row, on the processor

_SYSTEM, _USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
ANSWER = "Zq7answer"  # text that no template changes or holds
_ANSWERED = [_USER, {"role": "assistant", "content": ANSWER}]
_CHATS: tuple[tuple[list[Message], bool], ...] = (
    ([_USER], True),
    (_ANSWERED, False),
    ([_SYSTEM, *_ANSWERED, _USER], True),
)  # with or without the beginning of an answer

_tried: set[str] = set()


def render(tokenizer: Any, messages: Sequence[Message], source: str = "") -> list[int]:
    """Token ids of a chat that is to be answered.

    Raises:
        RowError: the template's own words, after ``source``, the row's file and line.
    """
    try:
        with _ending():
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # any: it is the template's own code
        where = f"{source}: " if source else ""
        raise RowError(f"{where}the chat template refuses this row: {_words(error)}") from error
    return list(ids["input_ids"])


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Raise where the inside makes no end, in a loop that only some rows meet. It cannot be a copy of the process for
    each of them, so this is for the main thread, where Python handles signals, and not for one endless instruction."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.thread_time()

    def look(*_: Any) -> None:
        if time.thread_time() - began >= _ROW_SECONDS:  # the timer counts what other threads do as well
            raise TimeoutError(f"it did not end within {_ROW_SECONDS:g} seconds")

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, _ROW_SECONDS, _ROW_SECONDS / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def closing_text(tokenizer: Any) -> str:
    """What the chat template writes after an assistant's last turn; nothing where it refuses the chat."""
    try:
        text: str = tokenizer.apply_chat_template(_ANSWERED, tokenize=False)
    except Exception:  # any: as above
        return ""
    _, mark, tail = text.rpartition(ANSWER)
    return tail if mark else ""


def tokens_of_template(tokenizer: Any) -> set[int]:
    """Token ids of chats as the template writes them, those that it accepts."""
    tokens: set[int] = set()
    for chat, opens in _CHATS if tokenizer.chat_template else ():
        with contextlib.suppress(Exception):  # any: as above
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=opens, tokenize=False)
            tokens.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens


def check_template(tokenizer: Any, where: str) -> None:
    """Try the chat template on short chats.

    Raises:
        ValueError: it is broken, does what the sandbox forbids, or did not end within bounds; ``where`` comes first.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template or str(template) in _tried:
        return
    problem = _bounded(lambda: _problem(tokenizer))
    if problem:
        raise ValueError(f"{where}: the chat template cannot be used: {problem}")
    _tried.add(str(template))


def _problem(tokenizer: Any) -> str:
    """What is wrong with a template whatever the row; that it refuses one chat or another is not."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    for number, (chat, opens) in enumerate(_CHATS):
        try:
            tokenizer.apply_chat_template(chat, add_generation_prompt=opens, tokenize=False)
        except MemoryError:
            return "it needs more than a gigabyte for a short chat"
        except (TemplateSyntaxError, SecurityError, OverflowError, RecursionError) as error:
            return _words(error)
        except Exception as error:  # any: as above
            if number == 0 and type(error) is not TemplateError:  # what `raise_exception` raises
                return _words(error)
    return ""


def _words(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    name = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    line = f" (its line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
    return f"{name}{' '.join(str(getattr(error, 'message', None) or error).split())}{line}"


def _bounded(work: Callable[[], str]) -> str:
    """What ``work`` returns, done in a copy of this process: the one place where a loop, a power of powers or a string
    of gigabytes is stopped for certain, whatever thread asks. Where processes cannot be copied it runs here."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return work()
    import jinja2.sandbox  # noqa: F401  before the copy, in which no other thread can let go of an import's lock
    import transformers.utils.chat_template_utils  # noqa: F401

    reader, writer = os.pipe()
    # Unset, the tokenizers library warns of every copy that is made.
    quiet = "TOKENIZERS_PARALLELISM" not in os.environ
    if quiet:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the copy waits for
        child = os.fork()
    if child == 0:
        try:
            gc.disable()  # nothing of the parent's is to be cleaned up here
            _limit()
            os.write(writer, work().encode()[:4096])
        finally:
            os._exit(0)
    if quiet:
        del os.environ["TOKENIZERS_PARALLELISM"]
    os.close(writer)
    with open(reader, "rb") as pipe:
        ended = bool(select.select([pipe], [], [], _SECONDS)[0])
        if not ended:
            os.kill(child, signal.SIGKILL)
        said = pipe.read().decode(errors="replace")
    status = 0
    with contextlib.suppress(ChildProcessError):  # somebody else has waited for it
        status = os.waitpid(child, 0)[1]
    if not ended or os.WIFSIGNALED(status):
        return f"it did not end within {_CPU_SECONDS} seconds on a short chat"
    return said


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    with contextlib.suppress(OSError, ValueError):  # no such file outside Linux, or a bound that is lower already
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + _BYTES, now + _BYTES))
