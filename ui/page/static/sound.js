// The Sound tab: words go over a socket of its own, speech comes back and is played as it is made.

import { Connection, socketUrl } from "./connection.js";
import { Player } from "./player.js";
import { wav } from "./wav.js";
import { Wave } from "./wave.js";

const KEPT_SECONDS = 600; // of sound for the download
const WAITS = { queued: "In the queue", waiting: "Reconnecting", connecting: "Connecting", ended: "Not connected" };

export class Sound {
  constructor(root, { offered, notice }) {
    this.root = root;
    this.offered = offered;
    this.notice = notice;
    this.player = new Player();
    this.wave = new Wave(this.find(".wave"));
    this.kept = []; // samples since the last silence in which somebody pressed Speak
    this.rate = 16_000;
    this.speaking = false; // is more to come?
    this.waiting = []; // texts for when the line is open
    this.find(".absent").hidden = offered;
    this.find(".speech").hidden = !offered;
    if (offered) this.hear();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  hear() {
    this.connection = new Connection(socketUrl("sound"), () => ({ mode: "play", ...(this.resume && { resume: this.resume }) }));
    const on = (name, handle) => this.connection.addEventListener(name, ({ detail }) => handle.call(this, detail));
    on("welcome", this.welcomed);
    on("state", ({ name }) => {
      if (name === "ended") this.speaking = false;
      this.render();
    });
    on("sound", this.arrived);
    on("said", this.said);
    on("refused", ({ message }) => this.notice(message, "bad"));
    on("status", ({ sound }) => {
      this.factor = sound?.real_time_factor ?? this.factor;
      this.render();
    });
    this.find(".say").addEventListener("submit", (event) => {
      event.preventDefault();
      this.speak(this.find("[name=text]").value);
    });
    this.find(".stop").addEventListener("click", () => this.stop());
    this.find(".save").addEventListener("click", () => this.save());
  }

  show(shown) {
    this.root.hidden = !shown;
    this.shown = shown;
    if (!this.offered) return;
    if (shown && this.connection.state.name === "closed") this.connection.open();
    if (!shown && this.busy) this.stop(); // what is shown now has the machine to itself
    this.render();
  }

  welcomed(welcome) {
    this.resume = welcome.resume;
    this.rate = welcome.sampling_rate;
    this.reported = 0; // gaps that this socket has told of
    this.before = this.player.underruns;
    const select = this.find("[name=voice]");
    if (!select.options.length) select.append(...welcome.voices.map((voice) => new Option(voice)));
    this.connection.send({ type: "start" });
    for (const text of this.waiting.splice(0)) this.say(text);
  }

  /** Is something still to be heard? */
  get busy() {
    return this.speaking || this.player.ahead > 0;
  }

  speak(text) {
    if (!text.trim()) return;
    this.player.wake(this.rate);
    if (!this.busy) {
      this.kept = [];
      this.wave.forget();
      this.asked = performance.now();
      this.first = NaN;
    }
    this.find("[name=text]").value = "";
    if (this.connection.isOpen) this.say(text);
    else {
      this.waiting.push(text);
      this.connection.open();
    }
  }

  async say(text) {
    this.speaking = true;
    this.render();
    try {
      await this.connection.ask({ type: "steer", text, voice: this.find("[name=voice]").value });
    } catch (error) {
      this.notice(error.message, "bad");
      this.speaking = this.player.ahead > 0 && !this.player.over;
      this.render();
    }
  }

  arrived({ samples, rate }) {
    if (this.stopping || !this.player.context) return;
    const at = this.player.add(samples, rate);
    if (Number.isNaN(this.first)) this.first = performance.now() - this.asked + 1000 * (at - this.player.now);
    this.wave.add(at, samples, rate);
    this.keep(samples);
    const gaps = this.player.underruns - this.before;
    if (gaps > this.reported) this.connection.send({ type: "heard", underruns: (this.reported = gaps) });
    this.render();
  }

  keep(samples) {
    this.kept.push(samples);
    let total = this.kept.reduce((sum, piece) => sum + piece.length, 0);
    while (total > KEPT_SECONDS * this.rate) total -= this.kept.shift().length;
  }

  said({ real_time_factor: factor }) {
    if (this.stopping) return;
    this.factor = factor ?? this.factor;
    this.player.finish();
    this.speaking = false;
    this.render();
  }

  async stop() {
    this.player.stop();
    this.speaking = false;
    this.waiting = [];
    this.stopping = true; // what is still on its way belongs to what was stopped
    this.render();
    try {
      await this.connection.ask({ type: "reset" });
    } catch {
      // The line was lost, and with it what was to be stopped.
    }
    this.stopping = false;
  }

  save() {
    const link = this.find(".save");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(wav(this.kept, this.rate));
  }

  render() {
    if (!this.offered) return;
    const { name } = this.connection.state;
    this.find(".status").dataset.state = this.busy ? "running" : name === "open" ? "paused" : "off";
    this.find(".status .line").textContent = this.line(name);
    this.find(".stop").disabled = !this.busy;
    this.find(".save").hidden = !this.kept.length;
    if (this.shown && !this.frame) this.frame = requestAnimationFrame(() => this.animate());
  }

  animate() {
    this.frame = 0;
    this.wave.draw(this.player.now);
    if (this.busy) this.frame = requestAnimationFrame(() => this.animate());
    else if (this.find(".status").dataset.state === "running") this.render();
  }

  /** "first sound 140 ms · 0.21 x real time · 0 underruns" */
  line(name) {
    if (name !== "open") return WAITS[name] ?? "Not connected";
    if (Number.isNaN(this.first)) return "Waiting for the first sound";
    if (this.first === undefined) return "Ready";
    const parts = [`first sound ${Math.round(this.first)} ms`];
    if (this.factor) parts.push(`${this.factor.toFixed(2)} x real time`);
    const gaps = this.player.underruns;
    return [...parts, `${gaps} underrun${gaps === 1 ? "" : "s"}`].join(" · ");
  }
}
