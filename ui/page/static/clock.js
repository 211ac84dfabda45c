// Whose clock is how far ahead: the difference between the server's milliseconds and this page's.

const KEPT = 16;

export class Clock {
  constructor() {
    this.samples = [];
  }

  /** A ping sent at `sent` was answered at `now` with the server's time. */
  answer(sent, server, now) {
    this.samples.push({ trip: now - sent, offset: server - (sent + now) / 2 });
    if (this.samples.length > KEPT) this.samples.shift();
  }

  get known() {
    return this.samples.length > 0;
  }

  /** The quickest round trip has the least room for error, so it alone tells the offset. */
  get best() {
    return this.samples.reduce((best, sample) => (sample.trip < best.trip ? sample : best), this.samples[0]);
  }

  get trip() {
    return this.known ? this.best.trip : NaN;
  }

  /** The server's milliseconds as this page's. */
  toPage(server) {
    return server - this.best.offset;
  }
}
