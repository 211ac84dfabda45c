// The session that this page holds: its mode, what has been asked of it, and what it has answered.

import { Connection, socketUrl } from "./connection.js";

const RESUME = (mode) => `millstream.resume.${mode}`;

/** Events: "state" {name, ...}, "welcome", "status", "prompted", "frame", "notice" {text, tone}; "changed" after any of them. */
export class Live extends EventTarget {
  constructor() {
    super();
    this.mode = null;
    this.welcome = null;
    this.prompts = {}; // mode -> the prompt applied last
    this.connection = new Connection(socketUrl("live"), () => this.hello());
    const hear = (name, handle) => this.connection.addEventListener(name, ({ detail }) => handle.call(this, detail));
    hear("state", (state) => this.tell("state", state));
    hear("welcome", this.welcomed);
    hear("status", this.heardStatus);
    hear("refused", ({ message }) => this.notice(message, "bad"));
    hear("frame", (frame) => this.dispatchEvent(new CustomEvent("frame", { detail: frame })));
    this.clear();
  }

  clear() {
    this.status = {};
    this.running = false;
    this.sent = 0; // version of the control steered last
    this.unanswered = []; // controls on their way to the picture: {version, at}
    this.response = NaN; // milliseconds from the last control to the first picture drawn under it
  }

  get state() {
    return this.connection.state;
  }

  get prompt() {
    return this.prompts[this.mode] ?? "";
  }

  hello() {
    const hello = { mode: this.mode, formats: ["webp", "jpeg"] };
    const resume = sessionStorage.getItem(RESUME(this.mode));
    if (resume) hello.resume = resume;
    if (this.prompt) hello.prompt = this.prompt;
    return hello;
  }

  /** Begin or take up the session of `mode`, leaving another mode's paused. */
  enter(mode) {
    if (mode === this.mode && this.state.name !== "closed") return;
    this.leave();
    this.mode = mode;
    this.connection.open();
  }

  leave() {
    if (this.connection.isOpen && this.running) this.connection.send({ type: "pause" });
    this.connection.close();
    this.clear();
  }

  again() {
    this.connection.open();
  }

  welcomed(welcome) {
    this.clear();
    this.welcome = welcome;
    this.running = welcome.running;
    this.resume = welcome.resume;
    sessionStorage.setItem(RESUME(this.mode), welcome.resume);
    this.prompts[this.mode] = welcome.prompt;
    this.tell("welcome", welcome);
  }

  heardStatus(status) {
    this.status = status;
    this.running = status.running;
    if (status.prompt !== this.prompt && this.sent <= status.applied) {
      this.prompts[this.mode] = status.prompt; // the timeline has changed it
      this.tell("prompted");
    }
    this.tell("status", status);
  }

  /** Change the control. With `told` its version is asked for, so that "applied" can be seen. */
  async steer(changes, told = true) {
    const message = { type: "steer", ...changes };
    if (!told || !this.connection.isOpen) {
      this.connection.send(message);
      return false;
    }
    const at = performance.now();
    try {
      const { version } = await this.connection.ask(message);
      this.sent = Math.max(this.sent, version);
      if (this.running) this.unanswered.push({ version, at });
    } catch (error) {
      this.notice(error.message, "bad");
      return false;
    }
    if ("prompt" in changes) this.prompts[this.mode] = changes.prompt;
    this.tell("steered");
    return true;
  }

  /** Does the model heed this part of a control? */
  heeds(name) {
    return this.welcome?.controls.includes(name) ?? false;
  }

  /** A picture drawn under `version` is on the canvas. */
  applied(version, now) {
    while (this.unanswered.length && this.unanswered[0].version <= version) {
      this.response = now - this.unanswered.shift().at;
    }
  }

  /** Ask for `type`; a refusal becomes a notice. Returns the answer, or null. */
  async order(type, fields = {}) {
    try {
      const answer = await this.connection.ask({ type, ...fields });
      if (type === "start") this.running = true;
      if (type === "pause" || type === "step") {
        this.running = false;
        this.unanswered = []; // what waits until somebody presses Start is no measure
      }
      if (typeof answer.prompt === "string") this.prompts[this.mode] = answer.prompt;
      this.tell("ordered", type);
      return answer;
    } catch (error) {
      this.notice(error.message, "bad");
      return null;
    }
  }

  notice(text, tone = "plain") {
    this.dispatchEvent(new CustomEvent("notice", { detail: { text, tone } }));
  }

  tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
    this.dispatchEvent(new Event("changed"));
  }
}
