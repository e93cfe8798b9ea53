"""Whether a page can be read and worked: contrast of its text, names of its controls, the order of the Tab key."""

from __future__ import annotations

from typing import Any

from chromium import Page

#: WCAG 2.2, level AA, for text that is not large.
LEAST_CONTRAST = 4.5
_ROLES = {"button", "checkbox", "combobox", "link", "listbox", "radio", "textbox"}
#: The contrast of every visible text with the ground that it stands on: [ratio, text], the lowest first.
_CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parts(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const text = walk.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest(".hidden, .skip, .toast")) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()"""
_FOCUSED = "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
_ORDER = """[...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex='0']")]
  .filter((one) => one.checkVisibility() && !(one.type === "radio" && !one.checked))
  .map((one) => one.id || one.name || one.tagName)"""


def contrast(page: Page) -> dict[str, Any]:
    """The lowest contrast. Exits below :data:`LEAST_CONTRAST`."""
    found = page.evaluate(_CONTRAST)
    ratio, text = found[0]
    if ratio < LEAST_CONTRAST:
        raise SystemExit(f"contrast of {ratio:.2f}: {[one for one in found if one[0] < LEAST_CONTRAST]}")
    return {"texts": len(found), "lowest": round(ratio, 2), "of": text}


def controls(page: Page) -> dict[str, int]:
    """Controls by role. Exits where assistive technology is told no name of one."""
    found: dict[str, int] = {}
    for node in page.accessible():
        role = node.get("role", {}).get("value", "")
        if node.get("ignored") or role not in _ROLES:
            continue
        found[role] = found.get(role, 0) + 1
        if not node.get("name", {}).get("value"):
            raise SystemExit(f"a {role} without a name: {node}")
    return found


def keyboard(page: Page) -> int:
    """Stops of the Tab key. Exits where they are not everything that can be worked, in the order of the page."""
    expected = page.evaluate(_ORDER)
    page.evaluate("document.body.focus(); document.activeElement.blur(); window.scrollTo(0, 0)")
    stops = []
    for _ in expected:
        page.press("Tab", "Tab", 9)
        stops.append(page.evaluate(_FOCUSED))
    if stops != expected:
        raise SystemExit(f"the Tab key goes to {stops}, the page has {expected}")
    return len(stops)
