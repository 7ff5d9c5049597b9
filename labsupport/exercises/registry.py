"""Where each chapter's exercises are. A chapter is imported when one of its exercises is asked for."""

from __future__ import annotations

from importlib import import_module

from labsupport.exercises.form import Exercise

CHAPTERS = {
    0: "start_here",
    1: "why_four_bits",
    2: "rounding",
    3: "group_size",
    4: "int8_outliers",
    5: "nf4",
    6: "gptq",
    7: "gptq_in_practice",
    8: "awq",
    9: "kv_cache",
    10: "packing_and_checkpoints",
    11: "kernels",
    12: "finetune_merge_requantize",
    13: "quantization_aware_training",
    14: "shootout",
    15: "choose_and_ship",
}


def exercises_of(chapter: int) -> tuple[Exercise, ...]:
    """All exercises of one chapter, in their order. Raises KeyError for a chapter without exercises."""
    if chapter not in CHAPTERS:
        raise KeyError(f"there is no chapter {chapter!r}, the chapters are {', '.join(map(str, CHAPTERS))}")
    return import_module(f"labsupport.exercises.{CHAPTERS[chapter]}").EXERCISES


def get(id: str) -> Exercise:
    """The exercise with this id, such as "2.4". Raises KeyError naming the ids of its chapter if there is none."""
    chapter = str(id).split(".")[0]
    if not chapter.isdigit() or int(chapter) not in CHAPTERS:
        raise KeyError(f"no exercise {id!r}: ids look like '2.4', chapters are {', '.join(map(str, CHAPTERS))}")
    exercises = exercises_of(int(chapter))
    for exercise in exercises:
        if exercise.id == id:
            return exercise
    raise KeyError(f"no exercise {id!r}: chapter {chapter} has {', '.join(e.id for e in exercises)}")


def all_exercises() -> list[Exercise]:
    return [e for chapter in CHAPTERS for e in exercises_of(chapter)]
