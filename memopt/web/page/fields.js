// What the form offers, from the flags and names that Python knows.

const $ = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const GENERAL = [
  { name: "weights", kind: "text", metavar: "DTYPE", help: "bf16 (default), fp32 or fp16" },
  { name: "gradients", kind: "text", metavar: "DTYPE", help: "by default as the weights" },
  { name: "hyper", kind: "text", metavar: "NAME=VALUE …", help: "hyperparameters, separated by spaces: momentum=0.9" },
];
const BEGIN_WITH = ["adamw", "adamw-8bit"];

/** Fill lists, and a field for each flag that has none of its own in the page. */
export function offer(choices) {
  $("models").replaceChildren(...choices.models.map((name) => make("option", { value: name })));
  $("cards").replaceChildren(
    ...choices.cards.map(({ name, text }) => make("option", { value: name, label: `${name}, ${text}` })),
  );
  offerSpecs(choices);
  const here = $("checkpointing");
  for (const how of choices.checkpointing) {
    if (![...here.options].some((option) => option.value === how)) here.add(new Option(how, how));
  }
  $("kind").replaceChildren(...choices.emit.map((kind) => new Option(kind, kind)));
  const form = $("settings");
  const flags = [...GENERAL, ...choices.flags].filter((flag) => !form.elements.namedItem(flag.name));
  $("flags").replaceChildren(...flags.map(field));
}

function offerSpecs({ specs, sharded, deepspeed }) {
  const all = [...new Set([...specs, ...sharded, ...deepspeed])];
  $("specs").replaceChildren(
    ...all.map((spec) =>
      make(
        "label",
        { className: spec.includes("/") ? "check sharded" : "check" },
        make("input", { type: "checkbox", name: "optim", value: spec, defaultChecked: BEGIN_WITH.includes(spec) }),
        make("span", {}, spec),
      ),
    ),
  );
}

function field({ name, kind, metavar, help }) {
  const id = `flag-${name}`;
  const hint = make("p", { className: "hint", id: `${id}-hint` }, help);
  const label = name.replaceAll("_", " ");
  if (kind === "switch") {
    const box = make("input", { type: "checkbox", id, name, "aria-describedby": hint.id });
    return make("div", { className: "flag" }, make("label", { className: "check" }, box, make("span", {}, label)), hint);
  }
  const input = make("input", { id, name, maxLength: 500, placeholder: metavar, "aria-describedby": hint.id });
  input.spellcheck = false;
  if (kind === "number") input.inputMode = "numeric";
  return make("div", { className: "flag field" }, make("label", { htmlFor: id }, label), input, hint);
}
