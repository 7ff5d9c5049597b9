"""Widgets on a page: each control is reached, has a name, and is moved by keyboard and by mouse; the picture under it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from browser.notebook import Opened, idle
from playwright.sync_api import Locator

# What the course's widgets are made of. Whatever else can be focused in a widget is a control that nobody moves here: a fault.
FIELD, MENU, BUTTON = "input[type=number]", "select", "button"
CONTROLS = f":is({FIELD}, {MENU}, {BUTTON})"
FOCUSABLE = ":is(a[href], input, select, textarea, button, [tabindex], [contenteditable=true])"
ANSWER_SECONDS, OPENS_MILLISECONDS = 30, 300  # a figure takes half a second, on a busy machine several


@dataclass(frozen=True)
class Control:
    """One control of a widget, as the browser tells it to assistive software."""

    place: Locator
    kind: str
    role: str
    name: str


def widgets(notebook: Opened) -> list[Locator]:
    """The outermost box of each widget on the page that has a control."""
    boxes = notebook.panel.locator(".jp-OutputArea-output > .jupyter-widgets")
    return [box for box in boxes.all() if box.locator(FOCUSABLE).count()]


def controls(notebook: Opened, widget: Locator) -> list[Control]:
    """Fields and menus first: a button may lead to where its widget starts, and changes nothing before another control has."""
    found = []
    for kind in (FIELD, MENU, BUTTON):
        for place in widget.locator(kind).all():
            role, name = _told(notebook, place)
            found.append(Control(place, kind, role, name))
    return found


def _told(notebook: Opened, place: Locator) -> tuple[str, str]:
    """Role and name in the browser's own accessibility tree."""
    session = notebook.page.context.new_cdp_session(notebook.page)
    place.evaluate("element => element.setAttribute('data-looked-at', '')")
    try:
        root = session.send("DOM.getDocument")["root"]["nodeId"]
        node = session.send("DOM.querySelector", {"nodeId": root, "selector": "[data-looked-at]"})["nodeId"]
        told = session.send("Accessibility.getPartialAXTree", {"nodeId": node, "fetchRelatives": False})["nodes"][0]
    finally:
        place.evaluate("element => element.removeAttribute('data-looked-at')")
        session.detach()
    return told["role"]["value"], told.get("name", {}).get("value", "")


def faults(notebook: Opened, widget: Locator) -> Iterator[str]:
    """Move every control of the widget both ways; a sentence for each that has no name, is not reached, or is not answered."""
    others = widget.locator(FOCUSABLE).count() - widget.locator(CONTROLS).count()
    if others:
        yield f"a widget has {others} controls of a kind that is not moved here"
    found = controls(notebook, widget)
    names = [control.name for control in found]
    for control in found:
        if not control.name.strip() or names.count(control.name) > 1:
            yield f"a {control.role} named {control.name!r} in a widget with {names}"
    yield from _order_faults(notebook, widget)
    for way, move in (("keyboard", by_keyboard), ("mouse", by_mouse)):
        for control in found:
            before = _picture(widget)
            move(notebook, control)
            if not _changes(widget, before):
                yield f"the picture does not answer to {control.role} {control.name!r} by {way}"
            idle(notebook.page).wait_for()  # no answer to this control is taken for one to the next


def _order_faults(notebook: Opened, widget: Locator) -> Iterator[str]:
    """Tab leads from each control to the next, in the order in which they stand."""
    places = widget.locator(CONTROLS).all()
    for place in places[:1]:
        place.focus()
    for number, place in enumerate(places[1:], 1):
        notebook.page.keyboard.press("Tab")
        if not place.evaluate("element => element === document.activeElement"):
            yield f"Tab does not lead to control {number} of a widget"
            place.focus()


def by_keyboard(notebook: Opened, control: Control) -> None:
    """As somebody does who has no mouse.

    A menu is opened before a choice is made: JupyterLab takes the keys of a closed one for itself and goes to another cell
    (github.com/jupyter-widgets/ipywidgets/issues/3912).
    """
    keyboard = notebook.page.keyboard
    control.place.focus()
    if control.kind == BUTTON:
        keyboard.press("Enter")
    elif control.kind == MENU:
        keyboard.press("Space")
        notebook.page.wait_for_timeout(OPENS_MILLISECONDS)
        keyboard.press("ArrowUp" if _is_last(control.place) else "ArrowDown")
        keyboard.press("Enter")
    else:
        key = "ArrowDown" if _is_at(control.place, "max") else "ArrowUp"
        _step(control.place, lambda: keyboard.press(key))


def by_mouse(notebook: Opened, control: Control) -> None:
    """Clicks. The choice in an open menu is Playwright's: Chromium draws it outside of the page, where no click arrives."""
    control.place.scroll_into_view_if_needed()
    if control.kind == FIELD:
        box = control.place.bounding_box()
        arrow = {"x": box["width"] - 9, "y": box["height"] * (0.3 if _is_at(control.place, "min") else 0.7)}
        control.place.hover()  # the arrows of a field show under the mouse, one above the other
        _step(control.place, lambda: control.place.click(position=arrow))
    elif control.kind == MENU:
        index = control.place.evaluate("menu => menu.selectedIndex")
        control.place.click()
        control.place.select_option(index=0 if _is_last(control.place) else index + 1)
        notebook.page.keyboard.press("Escape")
    else:
        control.place.click()


def _step(field: Locator, press: Callable[[], None]) -> None:
    """Press until the number has moved by half a step: the first press may only round it, which no picture can show."""
    start, step = float(field.input_value()), float(field.get_attribute("step"))
    for _ in range(3):
        press()
        if abs(float(field.input_value()) - start) > step / 2:
            return


def _is_at(field: Locator, end: str) -> bool:
    return field.evaluate("(field, end) => field.value === field[end]", end)


def _is_last(menu: Locator) -> bool:
    return menu.evaluate("menu => menu.selectedIndex === menu.options.length - 1")


def _picture(widget: Locator) -> str:
    """The bytes of the widget's picture, as they stand in its address."""
    return widget.locator("img").first.get_attribute("src") or ""


def _changes(widget: Locator, before: str) -> bool:
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        if _picture(widget) not in ("", before):
            return True
        time.sleep(0.05)
    return False
