// A box that scrolls can be scrolled with the keyboard: it is a stop of the Tab key for as long as something is out of its sight.
const BOXES = ".highlight pre, pre.printed, .table-wrapper, .scrolls, .formula";

function markScrolling() {
  for (const box of document.querySelectorAll(BOXES)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

markScrolling();
addEventListener("load", markScrolling);
addEventListener("resize", markScrolling);
document.addEventListener("toggle", markScrolling, true); // what a <details> hid had no size

// In a folder without a server a page may not read another: the search shows what it found without the words around it.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
