// Joins the parts of the page. `start` is called once, when Gradio has put the page's HTML into the document.

import { Camera } from "./camera.js";
import { Controls } from "./controls.js";
import { coverFor } from "./cover.js";
import { Keys } from "./keys.js";
import { Live } from "./live.js";
import { More } from "./more.js";
import { dropped, Numbers } from "./numbers.js";
import { Picker } from "./picker.js";
import { Screen } from "./screen.js";
import { Sound } from "./sound.js";
import { makeTabs } from "./tabs.js";
import { Timeline } from "./timeline.js";
import { buildTouch, legend } from "./touch.js";
import { Words } from "./words.js";

const NOTICE_FOR = 6_000;
const FORMS = ["generate", "image"]; // which Gradio draws

export function start(element, server) {
  const root = element.querySelector(".ms") ?? element;
  return new Page(root, server);
}

class Page {
  constructor(root, server) {
    this.root = root;
    this.stage = this.find(".stage");
    this.live = new Live();
    this.camera = new Camera(this.live, this.find(".before canvas"));
    this.screen = new Screen(this.find(".screen"), {
      ageOf: (frame, now) => this.ageOf(frame, now),
      drawn: (frame, age) => this.drawn(frame, age),
    });
    this.keys = new Keys(this.stage, (changes, told) => this.live.steer(changes, told));
    this.controls = new Controls(root, this.live, { restart: () => this.restart() });
    this.words = new Words(root, this.live, { focus: () => this.stage.focus({ preventScroll: true }) });
    this.more = new More(this.find(".more"), this.live);
    this.numbers = new Numbers(this.find("#panel-numbers"), this.live, this.screen);
    this.sound = new Sound(this.find("#panel-sound"), {
      offered: root.dataset.speech === "yes",
      notice: (text, tone) => this.live.notice(text, tone),
    });
    this.timeline = new Timeline(this.find(".timeline"), this.live);
    this.picker = new Picker(this.find(".picker"), this.find(".model"), server, {
      loaded: () => this.live.again(),
      notice: (text, tone) => this.live.notice(text, tone),
    });
    this.hear();
    this.hearCamera();
    makeTabs(this.find(".tabs"), (view) => this.show(view));
    root.page = this; // for whoever looks from the console
    root.dataset.ready = "true";
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  hear() {
    const { live } = this;
    live.addEventListener("frame", ({ detail }) => {
      this.screen.offer(detail);
      if (live.mode === "camera") this.camera.arrived(detail.time);
    });
    live.addEventListener("welcome", ({ detail }) => this.welcomed(detail));
    live.addEventListener("state", ({ detail }) => this.stateChanged(detail));
    live.addEventListener("changed", () => this.render());
    live.addEventListener("status", () => this.showStatus());
    live.addEventListener("notice", ({ detail }) => this.showNotice(detail));
    setInterval(() => this.showStatus(), 500);
    this.find(".cover-button").addEventListener("click", () => this.act());
    this.stage.addEventListener("click", (event) => this.clicked(event));
    // After a click on a control the keys go on steering; whoever moves by Tab stays where they are.
    this.root.addEventListener("click", (event) => {
      const button = event.target.closest(".bar button, .cover-button");
      if (button && event.detail > 0) this.stage.focus({ preventScroll: true });
    });
  }

  hearCamera() {
    const file = this.find(".source input[type=file]");
    this.live.addEventListener("ordered", ({ detail }) => (this.camera.single = detail === "step"));
    this.find(".use-camera").addEventListener("click", () => this.openSource(() => this.camera.openCamera()));
    file.addEventListener("change", () => {
      if (file.files.length) this.openSource(() => this.camera.openFile(file.files[0]));
      file.value = "";
    });
    this.camera.onended = () => {
      this.camera.release();
      this.live.notice("The camera was unplugged.", "bad");
      this.render();
    };
    const wipe = this.find(".wipe");
    wipe.addEventListener("input", () => this.wipe(Number(wipe.value)));
    this.wipe(0);
  }

  wipe(percent) {
    this.find(".before").style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    this.stage.style.setProperty("--wipe", `${percent}%`);
    this.stage.classList.toggle("wiped", percent > 0 && percent < 100);
    this.find(".wipe + output").textContent = percent === 0 ? "after" : percent === 100 ? "before" : `${percent} %`;
  }

  async openSource(open) {
    try {
      await open();
      if (this.view !== "camera") this.camera.release(); // the user has left while the browser asked
      else if (!this.live.running) await this.live.order("start");
    } catch (error) {
      this.live.notice(error.message, "bad");
    }
    this.render();
  }

  /** A tab was chosen. Camera and Play share the picture; each has a session of its own. */
  show(view) {
    const live = view === "play" || view === "camera";
    this.find("#panel-live").hidden = !live;
    this.find("#panel-numbers").hidden = view !== "numbers";
    this.sound.show(view === "sound");
    for (const name of FORMS) {
      const form = document.getElementById(`ms-${name}`);
      form.setAttribute("role", "tabpanel");
      form.setAttribute("aria-labelledby", `tab-${name}`);
      form.classList.toggle("shown", view === name);
    }
    this.view = view;
    if (live) this.enter(view);
    else if (!this.live.mode) this.enter("play");
    // Numbers watches what runs; a form, and speech, have the machine to themselves.
    const alone = FORMS.includes(view) || view === "sound";
    if (view === "play" || alone) this.camera.release();
    if (alone && this.live.running) this.live.order("pause");
    this.listen();
    this.numbers.draw();
    this.render();
  }

  enter(mode) {
    if (mode !== this.live.mode) this.restart();
    this.root.dataset.mode = mode;
    this.find("#panel-live").setAttribute("aria-labelledby", `tab-${mode}`);
    for (const name of ["play", "camera"]) {
      for (const element of this.root.querySelectorAll(`.${name}-only`)) element.hidden = name !== mode;
    }
    this.live.enter(mode);
  }

  welcomed(welcome) {
    const [height, width] = welcome.size;
    this.stage.style.setProperty("--shape", `${width} / ${height}`);
    this.stage.style.setProperty("--ratio", width / height);
    this.find(".model .name").textContent = [welcome.model, welcome.recipe, welcome.preset].filter(Boolean).join(" · ");
    buildTouch(this.find(".touch"), welcome.keys, this.keys);
    this.find(".legend").replaceChildren(...legend(welcome.keys).map(legendEntry));
    this.camera.forget();
    if (welcome.resumed) this.live.steer({ keys: [] }, false); // keys that went up while the line was down
    else this.restart();
  }

  /** Another stream: the picture on the canvas is not its. */
  restart() {
    this.screen.blank();
    this.hasPicture = false;
    this.render();
  }

  stateChanged({ name }) {
    if (name === "ended") this.hasPicture = false;
    if (name !== "open") this.keys.releaseAll();
  }

  ageOf(frame, now) {
    if (this.live.mode === "camera") return now - frame.time;
    const { clock } = this.live.connection;
    return clock.known ? now - clock.toPage(frame.time) : NaN;
  }

  drawn(frame, age) {
    const shown = { type: "shown", frame: frame.number };
    if (Number.isFinite(age)) shown.age = age;
    this.live.connection.send(shown);
    this.live.applied(frame.version, performance.now());
    if (this.live.mode === "camera") this.camera.drawn(frame.time);
    if (!this.hasPicture) {
      this.hasPicture = true;
      this.render();
    }
  }

  listen() {
    const active = this.view === "play" && this.live.state.name === "open" && this.live.running;
    this.keys.listen(this.live.welcome?.keys ?? {}, active);
  }

  render() {
    this.listen();
    const cover = coverFor(this.live, { drawn: this.hasPicture, sourceOpen: this.camera.ready });
    const element = this.find(".cover");
    element.hidden = !cover;
    this.stage.classList.toggle("paused", !cover && !this.live.running);
    if (cover) {
      element.querySelector(".cover-title").textContent = cover.title;
      element.querySelector(".cover-text").textContent = cover.text;
      const button = element.querySelector("button");
      button.hidden = !cover.button;
      button.textContent = cover.button ?? "";
      this.action = cover.action;
    }
    this.showStatus();
  }

  act() {
    if (this.action === "start") this.live.order("start");
    else if (this.action === "again") this.live.again();
    else if (this.action === "reload") location.reload();
    else if (this.action === "camera") this.openSource(() => this.camera.openCamera());
  }

  clicked(event) {
    if (event.target.closest("button, input, label")) return;
    this.stage.focus({ preventScroll: true });
    if (this.view === "play" && this.live.running) this.keys.lock();
  }

  /** "16.2 fps · 78 ms old · 0 dropped · v4 applied" */
  showStatus() {
    const { live, screen } = this;
    const line = this.find(".status .line");
    this.find(".status").dataset.state = live.state.name === "open" ? (live.running ? "running" : "paused") : "off";
    if (live.state.name !== "open") {
      line.textContent = { queued: "In the queue", waiting: "Reconnecting", connecting: "Connecting" }[live.state.name] ?? "Not connected";
      return;
    }
    if (!live.running) {
      line.textContent = this.hasPicture ? "Paused" : "Ready";
      return;
    }
    if (!this.hasPicture) {
      line.textContent = "Waiting for the first picture";
      return;
    }
    const parts = [`${screen.rate.toFixed(1)} fps`];
    if (Number.isFinite(screen.age)) parts.push(`${Math.round(screen.age)} ms old`);
    parts.push(`${dropped(live, screen)} dropped`, `v${screen.version} applied`);
    if (live.sent > screen.version) parts.push(`v${live.sent} on its way`);
    line.textContent = parts.join(" · ");
  }

  showNotice({ text, tone }) {
    const notice = this.find(".notice");
    notice.textContent = text;
    notice.dataset.tone = tone;
    notice.classList.add("shown");
    clearTimeout(this.noticeTimer);
    this.noticeTimer = setTimeout(() => notice.classList.remove("shown"), NOTICE_FOR);
  }
}

function legendEntry({ verb, keys }) {
  const entry = document.createElement("span");
  for (const key of keys) {
    const cap = document.createElement("kbd");
    cap.textContent = key;
    entry.append(cap);
  }
  entry.append(` ${verb}`);
  return entry;
}
