"""The exercises: what is asked, the reference, how an answer is judged."""

from labsupport.exercises.session import check, revisit, score, tally

__all__ = ["check", "revisit", "score", "tally"]
