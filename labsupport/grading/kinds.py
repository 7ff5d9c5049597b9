"""What each exercise asks for: to build something, to find something, or to explain something.

What the kinds mean for assessment, where learners have a chat at hand:

- "build": write a function whose specification stands in the notebook. A chat writes most of these from the text of the cell. A
  pass shows that working code was handed in, and says little about who could have written it. Most exercises are of this kind,
  because building is how the course teaches.
- "find": give an input, a case or a counter-example. The answer is the thing itself or makes it, and the judge measures whether it
  has what was asked for. The idea has to come first: where a method is weak, and why.
- "explain": from outputs, files, runs or measurements, say which cause, which choice or which verdict fits them. Things that look
  alike have to be told apart, on cases that the answer has not seen.

No kind is proof against a chat. "find" and "explain" are those about which two minutes of questions tell most, and the only ones
that a specification does not already solve; `Policy.understanding` is by how much more they count.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["build", "find", "explain"]

_IDS: dict[Kind, str] = {
    "build": """
        0.1 0.2 0.3   1.1 1.2 1.3 1.4   2.1 2.2 2.3 2.4 2.6 2.8   3.1 3.2 3.4 3.5 3.6   4.1 4.2 4.3 4.4
        5.1 5.2 5.3 5.4 5.5 5.7   6.1 6.2 6.3 6.4 6.5   7.1 7.2 7.3 7.4 7.7   8.1 8.2 8.3 8.4 8.5 8.6
        9.1 9.2 9.3 9.4 9.5 9.6   10.1 10.2 10.3 10.4 10.5 10.6   11.1 11.2 11.3 11.4 11.5
        12.1 12.2 12.3   13.1 13.3 13.4 13.5 13.6   14.1 14.2 14.3 14.4 14.5   15.1 15.2 15.3 15.5""",
    "find": "1.6 2.7 3.3 4.5 4.6 5.6 6.6 7.5 12.4 13.2",
    "explain": "1.5 2.5 7.6 7.8 8.7 10.7 12.5 12.6 13.7 14.6 15.4",
}
KIND: dict[str, Kind] = {id: kind for kind, ids in _IDS.items() for id in ids.split()}
