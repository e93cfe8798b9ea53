// Draws what Python worked out (memopt/web/view.py): widths are shares of its figures, texts are its own.
import { make } from "./fields.js";

const $ = (id) => document.getElementById(id);
const TONES = { FITS: "yes", TIGHT: "tight", over: "no" };
let chosen = "";

/** The spec that is shown in detail. */
export const chosenSpec = () => chosen;

export function showError(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = !sentence;
  $("results").classList.toggle("stale", Boolean(sentence));
}

export function showEstimate({ view, command }, onChoose) {
  $("title").textContent = view.title;
  $("facts").textContent = view.facts.join(" · ");
  if (!view.columns.some((column) => column.spec === chosen)) chosen = "";
  const first = view.columns[view.chosen];
  $("summary").textContent = view.summary;
  $("summary").className = TONES[first.verdict] ?? "";
  $("change").textContent = view.change ? `Change first: ${view.change}.` : "";
  $("change").hidden = !view.change;
  $("command").textContent = command;
  showKey(view);
  const current = chosen || first.spec;
  $("compare").tBodies[0].replaceChildren(...view.columns.map((column) => row(column, view, current, onChoose)));
  $("compare").classList.toggle("without-card", view.gpu === null);
  $("compare-hint").textContent =
    "Bars: expected, with a thin line to what it is at most." + (view.gpu ? ` Upright line: the card's ${view.gpu_text}.` : "");
  showDetail(view.columns.find((column) => column.spec === current), view);
  return current;
}

function showKey(view) {
  $("key").replaceChildren(
    ...view.kinds.map((kind) => make("li", {}, make("i", { className: `swatch ${kind}`, ariaHidden: "true" }), kind)),
  );
}

function row(column, view, current, onChoose) {
  const radio = make("input", { type: "radio", name: "shown", value: column.spec, checked: column.spec === current });
  radio.addEventListener("change", () => {
    chosen = column.spec;
    onChoose();
  });
  return make(
    "tr",
    { className: column.spec === current ? "current" : "" },
    make("th", { scope: "row" }, make("label", { className: "check" }, radio, make("span", {}, column.spec))),
    make("td", { className: "chart" }, bar(column.kinds, view, column.high)),
    make("td", { className: "n", "data-of": "Expected" }, column.text),
    make("td", { className: "n", "data-of": "At most" }, column.high_text),
    make("td", { className: `said ${TONES[column.verdict] ?? ""}` }, column.verdict_text),
  );
}

function bar(kinds, view, high = 0) {
  const share = (nbytes) => `${(100 * nbytes) / view.scale}%`;
  const line = make("div", { className: "bar", ariaHidden: "true" });
  let total = 0;
  for (const { kind, nbytes, text } of kinds) {
    const part = make("i", { className: kind, title: `${kind}: ${text}` });
    part.style.width = share(nbytes);
    total += nbytes;
    line.append(part);
  }
  if (high > total) {
    const most = make("b", { className: "most", title: "at most" });
    most.style.left = share(total);
    most.style.width = share(high - total);
    line.append(most);
  }
  if (view.gpu) {
    const card = make("b", { className: "card", title: `the card: ${view.gpu_text}` });
    card.style.left = share(view.gpu);
    line.append(card);
  }
  return line;
}

function showDetail(column, view) {
  $("phases-title").textContent = `${column.spec} by phase of the step`;
  $("phases").tBodies[0].replaceChildren(
    ...column.phases.map((phase) =>
      make(
        "tr",
        { className: phase.peak ? "current" : "" },
        make("th", { scope: "row" }, phase.phase, ...(phase.peak ? [make("span", { className: "mark" }, "peak")] : [])),
        make("td", { className: "chart" }, bar(phase.kinds, view), spoken(phase.kinds)),
        make("td", { className: "n" }, phase.text),
      ),
    ),
  );
  $("figures-title").textContent = `${column.spec}: what you can check`;
  $("figures").tBodies[0].replaceChildren(
    ...column.figures.map(({ name, bounds, shown_by }) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name, make("small", {}, ...breakable(shown_by))),
        ...bounds.map((text) => make("td", { className: "n" }, text)),
      ),
    ),
  );
  const without = view.without.length ? `Not contained: ${view.without.join("; ")}` : "";
  $("notes").textContent = [column.elsewhere, without, ...view.notes].filter(Boolean).map((s) => `${s}.`).join(" ");
}

/** A dotted name that may be broken after its dots and underscores. */
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part) => [part, make("wbr")]);
}

/** What a bar says, for those who hear the page. */
function spoken(kinds) {
  return make("span", { className: "hidden" }, kinds.map(({ kind, text }) => `${kind} ${text}`).join(", "));
}

export function showPlanState(sentence) {
  $("plan-state").textContent = sentence;
  $("plan-state").hidden = !sentence;
  if (sentence) for (const id of ["plans", "plan-more"]) $(id).replaceChildren();
}

export function showPlans({ view }, onTake) {
  showPlanState("");
  $("plans").replaceChildren(...view.plans.map((plan) => planItem(plan, onTake)));
  $("plan-more").replaceChildren(...view.sentences.map((sentence) => make("li", {}, sentence)));
}

function planItem(plan, onTake) {
  const take = make("button", { type: "button" }, "Use");
  take.setAttribute("aria-label", `Use ${plan.title}`);
  take.addEventListener("click", () => onTake(plan.settings));
  const change = plan.changes.length ? plan.changes.join(", ") : "nothing: it is among what is compared";
  return make(
    "li",
    {},
    make(
      "div",
      { className: "plan" },
      make("strong", {}, plan.title),
      make("span", { className: "n" }, plan.text),
      ...(plan.changes.length ? [take] : []),
    ),
    make("p", {}, `Change: ${change}.`),
    make("p", { className: "hint" }, plan.why),
  );
}
