// The toolbar under the picture, and what hangs on it: recording, branches.

const BRANCHES = (mode) => `millstream.branches.${mode}`; // Play and Camera have a session each

export class Controls {
  constructor(root, live, { restart }) {
    this.live = live;
    this.restart = restart; // the picture on the canvas belongs to the past
    this.bar = root.querySelector(".bar");
    this.seed = this.bar.querySelector(".seed input");
    this.rec = root.querySelector(".rec");
    this.saved = root.querySelector(".saved");
    this.branches = root.querySelector(".branches");
    this.recording = false;
    this.known = []; // branches: {resume, name}
    this.current = ""; // resume of the branch that is being drawn
    const on = (selector, handle) => this.bar.querySelector(selector).addEventListener("click", handle);
    on(".run", () => this.live.order(this.live.running ? "pause" : "start"));
    on("[data-order=step]", () => this.live.order("step"));
    on(".reset", () => this.reset());
    on(".back", () => this.back());
    on(".branch", () => this.branch());
    on(".record", () => this.record());
    live.addEventListener("changed", () => this.render());
    live.addEventListener("status", ({ detail }) => this.heard(detail.recording));
    live.addEventListener("welcome", ({ detail }) => this.welcomed(detail));
  }

  render() {
    const { live } = this;
    const open = live.state.name === "open";
    for (const button of this.bar.querySelectorAll("button")) button.disabled = !open;
    this.bar.querySelector(".run").textContent = live.running ? "Pause" : "Start";
    this.bar.querySelector("[data-order=step]").disabled = !open || live.running;
  }

  welcomed(welcome) {
    this.showRecording(false);
    const kept = JSON.parse(sessionStorage.getItem(BRANCHES(welcome.mode)) ?? "{}");
    const mine = kept.session === welcome.session && welcome.resumed;
    this.session = welcome.session;
    this.mode = welcome.mode;
    this.known = mine ? kept.known : [{ resume: welcome.resume, name: "Main" }];
    this.current = mine ? kept.current : welcome.resume;
    this.showBranches();
  }

  /** The server knows best whether it records: after a reload, or when the quota has ended it. */
  heard(recording) {
    this.showRecording(Boolean(recording));
    if (recording?.stopped && recording.stopped !== this.stopped) this.live.notice(recording.stopped, "bad");
    this.stopped = recording?.stopped ?? "";
  }

  async reset() {
    const seed = this.seed.value === "" ? {} : { seed: Math.max(0, Math.round(Number(this.seed.value))) };
    const done = await this.live.order("reset", seed);
    if (done && !this.live.running) this.restart();
  }

  async back() {
    const answer = await this.live.order("back", { seconds: 5 });
    if (answer) this.live.notice(`Back ${(answer.seconds ?? 5).toFixed(0)} seconds`);
  }

  async branch() {
    const answer = await this.live.order("branch");
    if (!answer) return;
    this.known.push({ resume: answer.resume, name: `Branch ${this.known.length}` });
    this.showBranches();
    this.live.notice(`${this.known.at(-1).name} waits where you branched`);
  }

  async switchTo(branch) {
    if (branch.resume === this.current) return;
    if (!(await this.live.order("switch", { resume: branch.resume }))) return;
    this.current = branch.resume;
    this.showBranches();
  }

  showBranches() {
    const { session, known, current } = this;
    sessionStorage.setItem(BRANCHES(this.mode), JSON.stringify({ session, known, current }));
    this.branches.hidden = this.known.length < 2;
    const row = this.branches.querySelector(".row");
    row.replaceChildren(
      ...this.known.map((branch) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = branch.name;
        button.setAttribute("aria-pressed", branch.resume === this.current);
        button.addEventListener("click", () => this.switchTo(branch));
        return button;
      }),
    );
  }

  async record() {
    const answer = await this.live.order("record", { on: !this.recording });
    if (!answer) return;
    this.showRecording(!this.recording);
    if (answer.url) this.offer(answer);
  }

  showRecording(on) {
    this.recording = on;
    this.rec.hidden = !on;
    const button = this.bar.querySelector(".record");
    button.setAttribute("aria-pressed", on);
    button.textContent = on ? "Stop recording" : "Record";
  }

  offer({ url, seconds, bytes }) {
    const address = new URL(url.replace(/^\//, ""), document.baseURI);
    if (!address.search) address.searchParams.set("key", this.live.resume);
    const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
    this.saved.querySelector("span").textContent = `Recorded ${seconds.toFixed(1)} s, ${size}.`;
    const link = this.saved.querySelector("a");
    link.href = address;
    link.download = `millstream-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-")}.mp4`;
    this.saved.hidden = false;
  }
}
