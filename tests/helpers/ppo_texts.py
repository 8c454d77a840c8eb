"""The few prompts of the skill world that the tests of PPO train on."""

from __future__ import annotations

TEXTS = ("Reverse the letters of abcd", "Write backwards: xyz", "Give the last letter of abc", "Count the letters of q",
         "Put into upper case: pqrs")  # fmt: skip
