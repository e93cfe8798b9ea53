// The form as settings (memopt/web/settings.py), and the settings as the fragment of a link.

const form = document.getElementById("settings");
const LISTS = ["optim", "hyper"];

const words = (text) => text.split(/\s+/).filter(Boolean);
const boxes = () => [...form.elements].filter((one) => one.name === "optim");
const fields = () => [...form.elements].filter((one) => one.name && !["optim", "more"].includes(one.name));

export function read() {
  const settings = {};
  for (const one of fields()) {
    if (one.type === "checkbox") {
      if (one.checked) settings[one.name] = true;
    } else if (one.value.trim()) {
      settings[one.name] = one.name === "hyper" ? words(one.value) : one.value.trim();
    }
  }
  if (settings.config) delete settings.model;
  const chosen = boxes().filter((box) => box.checked).map((box) => box.value);
  const optim = [...new Set([...chosen, ...words(form.elements.more.value)])];
  return optim.length ? { ...settings, optim } : settings;
}

/** Put settings into the form; what they do not name becomes empty. The names that the form does not have. */
export function write(settings) {
  const rest = new Set(Object.keys(settings));
  for (const one of fields()) {
    const value = settings[one.name];
    rest.delete(one.name);
    if (one.type === "checkbox") one.checked = Boolean(value);
    else if (one.tagName === "SELECT") select(one, value);
    else one.value = Array.isArray(value) ? value.join(" ") : (value ?? "");
  }
  rest.delete("optim");
  const optim = new Set(settings.optim ?? []);
  for (const box of boxes()) {
    box.checked = optim.delete(box.value);
  }
  form.elements.more.value = [...optim].join(" ");
  document.getElementById("paste").open = Boolean(settings.config);
  if (fields().some((one) => one.closest("#flags") && settings[one.name])) document.getElementById("others").open = true;
  return [...rest];
}

/** A value that the list does not offer is offered, so that Python says what is wrong with it. */
function select(one, value) {
  if (value && ![...one.options].some((option) => option.value === value)) one.add(new Option(value, value));
  one.value = value ?? one.options[0].value;
}

export function toFragment(settings) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(settings)) {
    for (const one of Array.isArray(value) ? value : [value]) pairs.append(name, one === true ? "yes" : one);
  }
  return pairs.toString();
}

export function fromFragment(fragment) {
  const settings = {};
  const switches = new Set(fields().filter((one) => one.type === "checkbox").map((one) => one.name));
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (LISTS.includes(name)) (settings[name] ??= []).push(value);
    else settings[name] = switches.has(name) ? value === "yes" : value;
  }
  return settings;
}
