"""How much was tried, at the end."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter) -> None:
    from helpers.hostile.drawn import tried

    if tried:
        found = ", ".join(f"{kind} {count}" for kind, count in sorted(tried.items()))
        terminalreporter.write_line(f"hostile inputs tried: {sum(tried.values())} ({found})")
