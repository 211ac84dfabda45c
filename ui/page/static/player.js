// Plays sound as it comes, without gaps: each piece is scheduled to the sample where the one before ends.

const LEAD = 0.08; // seconds that are gathered before the first is heard, and again after a gap
const REMEMBERED = 512; // pieces

export class Player {
  constructor() {
    this.context = null;
    this.underruns = 0;
    this.scheduled = []; // {at, seconds}, the newest last
    this.forget();
  }

  forget() {
    this.end = null; // when everything that came will have been heard
    this.over = false; // whatever was asked for has come
    this.sources = new Set();
  }

  /** To be called in a click: browsers let no page make a sound by itself. */
  wake(rate) {
    this.context ??= new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
    if (this.context.state === "suspended") this.context.resume();
  }

  get now() {
    return this.context?.currentTime ?? 0;
  }

  /** Seconds of sound that wait. */
  get ahead() {
    return this.end === null ? 0 : Math.max(0, this.end - this.now);
  }

  /** Int16 samples at `rate`; returns when they will be heard, in the context's seconds. */
  add(samples, rate) {
    const buffer = this.context.createBuffer(1, samples.length, rate);
    const channel = buffer.getChannelData(0);
    for (let i = 0; i < samples.length; i++) channel[i] = samples[i] / 32767;
    if (this.end === null || this.end < this.now) {
      if (this.end !== null && !this.over) this.underruns++;
      this.end = this.now + LEAD;
    }
    this.over = false;
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.onended = () => this.sources.delete(source);
    source.start(this.end);
    this.sources.add(source);
    const at = this.end;
    this.end += buffer.duration;
    this.scheduled.push({ at, seconds: buffer.duration });
    if (this.scheduled.length > REMEMBERED) this.scheduled.shift();
    return at;
  }

  finish() {
    this.over = true;
  }

  stop() {
    for (const source of this.sources) {
      source.onended = null;
      source.stop();
    }
    this.forget();
  }
}
