// The timeline: prompts that come by themselves, at times of the stream.

const seconds = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;

const KEPT = (mode) => `millstream.timeline.${mode}`; // Play and Camera have a session each

export class Timeline {
  constructor(root, live) {
    this.root = root;
    this.live = live;
    this.list = root.querySelector("ol");
    this.bar = root.querySelector(".ruler");
    this.entries = [];
    root.querySelector(".add").addEventListener("click", () => this.add());
    live.addEventListener("status", () => this.drawBar());
    live.addEventListener("welcome", (event) => this.welcomed(event.detail));
  }

  /** Seconds of the stream so far. */
  get now() {
    const { status, welcome } = this.live;
    return welcome && status.frame > 0 ? status.frame / welcome.rate : 0;
  }

  /** A resumed session still has its timeline; a fresh one, or another mode's, begins empty. */
  welcomed(welcome) {
    this.session = welcome.session;
    this.mode = welcome.mode;
    const kept = JSON.parse(sessionStorage.getItem(KEPT(welcome.mode)) ?? "{}");
    this.entries = kept.session === this.session && welcome.resumed ? kept.entries : [];
    this.render();
  }

  add() {
    const last = this.entries.at(-1)?.at ?? this.now;
    const entry = { at: Math.ceil(Math.max(last, this.now) + 5), prompt: "" };
    this.entries.push(entry);
    this.render();
    this.list.lastElementChild.querySelector("input[type=text]").focus();
  }

  render() {
    this.list.replaceChildren(...this.entries.map((entry) => this.row(entry)));
    this.drawBar();
  }

  row(entry) {
    const row = document.createElement("li");
    row.innerHTML = `
      <label><span class="hidden">Second</span><input type="number" min="0" max="100000" step="1"></label>
      <label class="grow"><span class="hidden">Prompt</span><input type="text" maxlength="2000" placeholder="then draw …"></label>
      <button type="button" class="ghost" aria-label="Remove">×</button>`;
    const [at, prompt] = row.querySelectorAll("input");
    at.value = entry.at;
    prompt.value = entry.prompt;
    at.addEventListener("change", () => this.change(entry, { at: Math.max(0, Number(at.value) || 0) }));
    prompt.addEventListener("change", () => this.change(entry, { prompt: prompt.value.trim() }));
    row.querySelector("button").addEventListener("click", () => {
      this.entries = this.entries.filter((other) => other !== entry);
      this.render();
      this.send();
    });
    return row;
  }

  change(entry, changes) {
    Object.assign(entry, changes);
    this.drawBar();
    this.send();
  }

  /** The whole timeline replaces the old one; rows without words are still being written. */
  async send() {
    sessionStorage.setItem(KEPT(this.mode), JSON.stringify({ session: this.session, entries: this.entries }));
    const entries = this.entries.filter((entry) => entry.prompt).sort((a, b) => a.at - b.at);
    await this.live.order("timeline", { entries: entries.map(({ at, prompt }) => ({ at, prompt })) });
  }

  drawBar() {
    const [now, marks] = [this.now, this.entries.filter((entry) => entry.prompt)];
    this.root.querySelector(".clock").textContent = seconds(now);
    const end = Math.max(30, now * 1.1, ...marks.map((entry) => entry.at * 1.1));
    this.bar.replaceChildren(
      ...marks.map((entry) => mark("mark", entry.at / end, entry.at <= now)),
      mark("head", now / end, true),
    );
  }
}

function mark(name, position, past) {
  const element = document.createElement("span");
  element.className = past ? `${name} past` : name;
  element.style.left = `${(100 * position).toFixed(2)}%`;
  return element;
}
