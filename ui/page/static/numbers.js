// The Numbers tab: a tile per number, with its last two minutes.

import { Plot } from "./plot.js";

const ms = (value) => (Number.isFinite(value) ? `${value < 9.95 ? value.toFixed(1) : Math.round(value)} ms` : "–");
const tenth = (value) => (Number.isFinite(value) ? value.toFixed(1) : "–");
const least = (values) => values.filter(Number.isFinite).map(Math.round);

function tiles(live, screen) {
  const status = () => live.status;
  const step = () => [status().step_ms?.p50, status().step_ms?.p95, status().step_ms?.p99];
  return [
    { name: "Frames per second", read: () => [screen.rate], show: ([rate]) => tenth(rate), note: "drawn on the canvas" },
    { name: "Frame age", read: () => [screen.age], show: ([age]) => ms(age), note: "from its making to the canvas" },
    {
      name: "Step time",
      read: step,
      show: ([p50]) => ms(p50),
      note: (values) => (least(values).length === 3 ? `p95 ${ms(values[1])}, p99 ${ms(values[2])}` : "median"),
    },
    {
      name: "Control to picture",
      read: () => [live.response],
      show: ([time]) => ms(time),
      note: "from a key to the first picture drawn under it",
    },
    {
      name: "Memory",
      read: () => [status().memory_mb],
      show: ([mb]) => (Number.isFinite(mb) ? `${Math.round(mb).toLocaleString("en")} MB` : "–"),
      note: "of the server's process",
    },
    { name: "Round trip", read: () => [live.connection.clock.trip], show: ([trip]) => ms(trip), note: "to the server and back" },
  ];
}

export class Numbers {
  constructor(root, live, screen) {
    this.live = live;
    this.screen = screen;
    this.root = root;
    this.facts = root.querySelector(".facts");
    this.tiles = tiles(live, screen).map((tile) => this.build(root.querySelector(".tiles"), tile));
    live.addEventListener("status", () => this.tick());
  }

  build(root, tile) {
    const element = document.createElement("article");
    element.className = "tile";
    element.innerHTML = `<h3></h3><p class="value">–</p><canvas role="img"></canvas><p class="note"></p>`;
    element.querySelector("h3").textContent = tile.name;
    const canvas = element.querySelector("canvas");
    canvas.setAttribute("aria-label", `${tile.name}, the last two minutes`);
    root.append(element);
    const lines = tile.read().length;
    return { ...tile, plot: new Plot(canvas, lines), value: element.querySelector(".value"), noteAt: element.querySelector(".note") };
  }

  tick() {
    for (const tile of this.tiles) {
      const values = tile.read();
      tile.plot.add(...values);
      tile.value.textContent = tile.show(values);
      tile.noteAt.textContent = typeof tile.note === "function" ? tile.note(values) : tile.note;
    }
    this.draw();
  }

  draw() {
    if (this.root.hidden) return;
    for (const tile of this.tiles) tile.plot.draw();
    this.facts.textContent = this.sentence();
  }

  sentence() {
    const { welcome, status } = this.live;
    if (!welcome) return "Not connected yet: the numbers come with the first picture.";
    const model = [welcome.model, welcome.recipe, welcome.preset].filter(Boolean).join(", ");
    const [height, width] = welcome.size;
    const parts = [`${model}: ${width} × ${height} at ${tenth(welcome.rate)} frames/s of its own clock`];
    if (status.frame >= 0) parts.push(`frame ${status.frame.toLocaleString("en")}`);
    if (status.sessions) parts.push(status.sessions === 1 ? "1 session" : `${status.sessions} sessions`);
    if (status.quality) parts.push(`picture quality ${status.quality}`);
    parts.push(`${dropped(this.live, this.screen)} dropped`);
    return parts.join(" · ");
  }
}

/** Frames that were drawn but never shown: replaced on the server, or here. */
export function dropped(live, screen) {
  return (live.status.dropped ?? 0) + screen.skipped;
}
