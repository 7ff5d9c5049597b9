"""Hostile answers (grading_hostile.txt) as data, and notebooks made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

TEXTS = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class Attack:
    """title: what is tried. text: of the answer, a Template. ids: exercises for which it makes sense, any without.

    alone: it reaches for the other answers of its notebook.
    """

    title: str
    text: str
    ids: tuple[str, ...] = ()
    alone: bool = False

    def answer(self, names: Mapping[str, object]) -> str:
        return Template(self.text).substitute(names)


def read() -> tuple[Attack, ...]:
    attacks = []
    for section in TEXTS.read_text("utf-8").split("\n--- ")[1:]:
        heading, _, text = section.split("\n=== ")[0].partition("\n")
        title, *about = (part.strip() for part in heading.split("|"))
        ids = [id for part in about if part != "alone" for id in part.split()]
        attacks.append(Attack(title, text.strip("\n") + "\n", tuple(ids), "alone" in about))
    return tuple(attacks)


ATTACKS = read()


def spread(attacks: tuple[Attack, ...], ids: Mapping[int, list[str]]) -> list[tuple[int, dict[str, Attack]]]:
    """Notebooks that together hold each attack once: the lab, and its attacks by exercise. ids: of each lab's exercises.

    One that is alone has a notebook of its own, and stands first in it: what it spoils is then run again only once.
    """
    notebooks: list[tuple[int, dict[str, Attack]]] = []
    labs = {id: lab for lab, all_of_it in ids.items() for id in all_of_it}
    turn = 0
    for attack in sorted(attacks, key=lambda attack: not attack.ids):  # those that fit few places first
        wanted = [id for id in attack.ids if id in labs] or [id for lab in ids for id in ids[lab]]
        if attack.alone:
            lab = list(ids)[turn % len(ids)]
            turn += 1
            notebooks.append((lab, {ids[lab][0]: attack}))
            continue
        for lab, taken in notebooks:
            free = [id for id in wanted if labs[id] == lab and id not in taken]
            if free and not any(other.alone for other in taken.values()):
                taken[free[0]] = attack
                break
        else:
            id = wanted[turn % len(wanted)]
            turn += 1
            notebooks.append((labs[id], {id: attack}))
    return notebooks
