// The sound as bars on a canvas: what was heard in the accent, what is still to come in a quiet tone.

import { blank } from "./blank.js";

const SECONDS = 8;
const BAR = 0.02; // seconds

export class Wave {
  constructor(canvas) {
    this.canvas = canvas;
    this.bars = []; // {at, peak}
  }

  forget() {
    this.bars = [];
  }

  add(at, samples, rate) {
    const width = Math.max(1, Math.round(BAR * rate));
    for (let first = 0; first < samples.length; first += width) {
      let peak = 0;
      for (const sample of samples.subarray(first, first + width)) peak = Math.max(peak, Math.abs(sample));
      this.bars.push({ at: at + first / rate, peak: peak / 32767 });
    }
    const old = at - 2 * SECONDS;
    while (this.bars.length && this.bars[0].at < old) this.bars.shift();
  }

  /** The bars around `now`, which stands at three quarters of the width. */
  draw(now) {
    const sheet = blank(this.canvas);
    if (!sheet) return;
    const { context, width, height, style } = sheet;
    const scale = width / SECONDS;
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(0, height / 2 - 0.5, width, 1);
    for (const { at, peak } of this.bars) {
      const x = 0.75 * width + (at - now) * scale;
      if (x < -4 || x > width) continue;
      const tall = Math.max(1.5, Math.sqrt(peak) * 0.9 * height);
      context.fillStyle = style.getPropertyValue(at <= now ? "--accent" : "--faint");
      context.fillRect(x, (height - tall) / 2, Math.max(1, BAR * scale - 1), tall);
    }
  }
}
