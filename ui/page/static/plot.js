// Small plots on canvases: the last two minutes of a number, in the colours of the page.

import { blank } from "./blank.js";

const KEPT = 120;

/** Rounds up to 1, 2 or 5 times a power of ten, so that an axis rarely moves. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

export class Plot {
  /** `lines` values are plotted over each other, the first one in full strength. */
  constructor(canvas, lines = 1) {
    this.canvas = canvas;
    this.series = Array.from({ length: lines }, () => []);
  }

  add(...values) {
    values.forEach((value, i) => {
      const series = this.series[i];
      series.push(value);
      if (series.length > KEPT) series.shift();
    });
  }

  draw() {
    const sheet = blank(this.canvas);
    if (!sheet) return;
    const { context, width, height, style } = sheet;
    const top = ceiling(Math.max(...this.series.flat().filter(Number.isFinite)) * 1.05);
    this.grid(context, width, height, top, style);
    context.strokeStyle = style.getPropertyValue("--accent");
    context.lineJoin = "round";
    [...this.series].reverse().forEach((series, i, all) => {
      const first = i === all.length - 1;
      context.globalAlpha = first ? 1 : 0.45 - 0.15 * (all.length - 2 - i);
      context.lineWidth = first ? 2 : 1.25;
      this.line(context, series, width, height, top);
    });
    context.globalAlpha = 1;
  }

  grid(context, width, height, top, style) {
    context.strokeStyle = style.getPropertyValue("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, height - 0.5);
    context.lineTo(width, height - 0.5);
    context.stroke();
    context.fillStyle = style.getPropertyValue("--faint");
    context.font = `11px ${style.fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "top";
    context.fillText(top.toLocaleString("en"), width, 0);
  }

  line(context, series, width, height, top) {
    const room = 34; // for the number at the right
    const step = (width - room) / (KEPT - 1);
    context.beginPath();
    let drawing = false;
    series.forEach((value, i) => {
      if (!Number.isFinite(value)) {
        drawing = false;
        return;
      }
      const x = width - room - (series.length - 1 - i) * step;
      const y = 2 + (1 - Math.min(value, top) / top) * (height - 4);
      if (drawing) context.lineTo(x, y);
      else context.moveTo(x, y);
      drawing = true;
    });
    context.stroke();
  }
}
