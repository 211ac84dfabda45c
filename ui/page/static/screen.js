// The canvas: the newest picture wins, drawn when the display is ready for one.

const RATE_OVER = 2_000;
const AGES_KEPT = 120;

export class Screen {
  /** `drawn(frame, age)` is called once a frame is on the canvas; `ageOf(frame, now)` tells its age in milliseconds. */
  constructor(canvas, { ageOf, drawn }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.ageOf = ageOf;
    this.drawn = drawn;
    this.forget();
  }

  /** A new stream: nothing of the old one counts. */
  forget() {
    this.ready?.bitmap.close();
    this.waiting = null; // arrived, not decoded
    this.ready = null; // decoded, not drawn
    this.skipped = 0;
    this.times = [];
    this.ages = [];
    this.version = 0;
    this.stream = {}; // what was being decoded belongs to the old one
  }

  blank() {
    this.forget();
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  offer(frame) {
    if (this.waiting) this.skip();
    this.waiting = frame;
    if (!this.decoding) this.decode();
  }

  /** A hidden page draws nothing, and that is nobody's loss. */
  skip() {
    if (!document.hidden) this.skipped += 1;
  }

  async decode() {
    this.decoding = true;
    while (this.waiting) {
      const [frame, stream] = [this.waiting, this.stream];
      this.waiting = null;
      const bitmap = await decoded(frame.picture).catch(() => null);
      if (bitmap && stream === this.stream) this.keep({ frame, bitmap });
      else bitmap?.close();
    }
    this.decoding = false;
  }

  keep(ready) {
    if (this.ready) {
      this.ready.bitmap.close();
      this.skip();
    } else {
      requestAnimationFrame(() => this.draw());
    }
    this.ready = ready;
  }

  draw() {
    if (!this.ready) return;
    const { frame, bitmap } = this.ready;
    this.ready = null;
    const { canvas } = this;
    const [width, height] = [bitmap.displayWidth ?? bitmap.width, bitmap.displayHeight ?? bitmap.height];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    this.context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const now = performance.now();
    const age = Math.max(0, this.ageOf(frame, now)); // NaN while the clocks are still being compared
    this.version = frame.version;
    this.times.push(now);
    if (Number.isFinite(age)) this.ages.push(age);
    if (this.ages.length > AGES_KEPT) this.ages.shift();
    while (now - this.times[0] > RATE_OVER) this.times.shift();
    this.drawn(frame, age);
  }

  /** Frames drawn per second, over the last two. */
  get rate() {
    const now = performance.now();
    const recent = this.times.filter((time) => now - time <= RATE_OVER);
    if (recent.length < 2) return 0;
    return (1000 * (recent.length - 1)) / Math.max(now - recent[0], recent.at(-1) - recent[0]);
  }

  /** Median age in milliseconds of the frames drawn last. */
  get age() {
    const recent = this.ages.slice(-30).sort((a, b) => a - b);
    return recent.length ? recent[recent.length >> 1] : NaN;
  }
}

/** Bytes as something to draw. A Blob would travel to another process and back, so WebCodecs where there is one. */
async function decoded({ type, data }) {
  if (!globalThis.ImageDecoder) return createImageBitmap(new Blob([data], { type }));
  const decoder = new ImageDecoder({ type, data });
  try {
    return (await decoder.decode()).image;
  } finally {
    decoder.close();
  }
}
