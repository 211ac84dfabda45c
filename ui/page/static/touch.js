// Buttons on the picture, for phones and for whoever would rather click: one per key that does something.

const PLACES = {
  KeyW: ["move", "up", "↑"],
  KeyS: ["move", "down", "↓"],
  KeyA: ["move", "left", "←"],
  KeyD: ["move", "right", "→"],
  ArrowLeft: ["turn", "left", "↶"],
  ArrowRight: ["turn", "right", "↷"],
  Space: ["turn", "down", ""],
};
const KEY_NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Space: "Space" };

/** "MOVE_FORWARD" -> "Move forward" */
export function words(button) {
  const text = button.replaceAll("_", " ").toLowerCase();
  return text[0].toUpperCase() + text.slice(1);
}

export function keyName(code) {
  return KEY_NAMES[code] ?? code.replace(/^(Key|Digit)/, "");
}

/** Two pads in `root`. A key whose button another key already presses is left out. */
export function buildTouch(root, map, keys) {
  root.replaceChildren();
  const pads = { move: pad("move"), turn: pad("turn") };
  const covered = new Set();
  const codes = Object.keys(map).sort((a, b) => (b in PLACES) - (a in PLACES));
  for (const code of codes) {
    if (covered.has(map[code])) continue;
    covered.add(map[code]);
    const [side, place, sign] = PLACES[code] ?? ["turn", "extra", ""];
    pads[side].append(touchButton(code, map[code], place, sign, keys));
  }
  for (const element of Object.values(pads)) if (element.childElementCount) root.append(element);
}

function pad(name) {
  const element = document.createElement("div");
  element.className = `pad pad-${name}`;
  return element;
}

function touchButton(code, name, place, sign, keys) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = `touch-${place}`;
  button.dataset.key = code;
  button.setAttribute("aria-label", words(name));
  button.textContent = sign || words(name);
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    keys.press(code);
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture", "blur"]) {
    button.addEventListener(end, () => keys.release(code));
  }
  button.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && !event.repeat) keys.press(code);
  });
  button.addEventListener("keyup", (event) => {
    if (event.key === "Enter" || event.key === " ") keys.release(code);
  });
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  return button;
}

/** "W A S D  move · ← →  turn · Space  attack": what the keyboard does, in one line. */
export function legend(map) {
  const byVerb = new Map();
  for (const [code, name] of Object.entries(map)) {
    const verb = name.split("_")[0].toLowerCase();
    byVerb.set(verb, [...(byVerb.get(verb) ?? []), code]);
  }
  return [...byVerb].map(([verb, codes]) => ({ verb, keys: sorted(codes).map(keyName) }));
}

function sorted(codes) {
  const order = ["KeyW", "KeyA", "KeyS", "KeyD", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight"];
  return [...codes].sort((a, b) => order.indexOf(a) - order.indexOf(b));
}
