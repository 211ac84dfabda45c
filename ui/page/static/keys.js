// What the user holds down: keys, touch buttons and the mouse, told to `steer` as it changes.

const TYPING = "input, textarea, select, [contenteditable]";
const PRESSING = "button, a, summary, [role=tab]";

/** A short tap must not vanish between two steps, so every change is told at once; mouse movement once per picture. */
export class Keys {
  constructor(stage, steer) {
    this.stage = stage;
    this.steer = steer;
    this.map = {};
    this.active = false;
    this.held = new Set();
    this.mouse = [0, 0];
    addEventListener("keydown", (event) => this.down(event));
    addEventListener("keyup", (event) => this.release(event.code));
    addEventListener("blur", () => this.releaseAll());
    document.addEventListener("visibilitychange", () => document.hidden && this.releaseAll());
    document.addEventListener("focusin", (event) => event.target.closest(TYPING) && this.releaseAll());
    document.addEventListener("mousemove", (event) => this.moved(event));
    document.addEventListener("pointerlockchange", () => this.lockChanged());
  }

  get locked() {
    return document.pointerLockElement === this.stage;
  }

  /** Which codes do something, and whether a stream listens. */
  listen(map, active) {
    this.map = map;
    this.active = active;
    if (!active) this.releaseAll();
  }

  down(event) {
    const target = event.target instanceof Element ? event.target : document.body;
    const modified = event.ctrlKey || event.metaKey || event.altKey;
    if (!this.active || modified || !(event.code in this.map) || target.closest(TYPING)) return;
    if (document.querySelector("dialog[open]")) return;
    if (event.code === "Space" && target.closest(PRESSING) && !target.closest("[data-key]")) return;
    event.preventDefault();
    if (!event.repeat) this.press(event.code);
  }

  press(code) {
    if (!this.active || this.held.has(code)) return;
    this.held.add(code);
    this.tell();
  }

  release(code) {
    if (this.held.delete(code)) this.tell();
  }

  releaseAll() {
    if (!this.held.size) return;
    this.held.clear();
    this.tell();
  }

  tell() {
    this.steer({ keys: [...this.held] }, true);
    this.stage.dispatchEvent(new CustomEvent("keys", { detail: this.held }));
  }

  /** Take the mouse, where the browser lets us; Escape gives it back. */
  async lock() {
    if (this.locked || !this.stage.requestPointerLock || matchMedia("(pointer: coarse)").matches) return;
    try {
      await this.stage.requestPointerLock();
    } catch {
      // The browser refuses for a second after Escape; the keyboard goes on working.
    }
  }

  lockChanged() {
    this.stage.classList.toggle("locked", this.locked);
    this.mouse = [0, 0];
  }

  moved(event) {
    if (!this.locked || !this.active) return;
    const first = !this.mouse[0] && !this.mouse[1];
    this.mouse[0] += event.movementX;
    this.mouse[1] += event.movementY;
    if (first) requestAnimationFrame(() => this.tellMouse());
  }

  tellMouse() {
    if (!this.mouse[0] && !this.mouse[1]) return;
    this.steer({ mouse: this.mouse }, false);
    this.mouse = [0, 0];
  }
}
