// The camera, or a video file in its place: pictures go out at the model's pace, one unanswered at a time. To a model
// that answers several at once go two lots of them: one is being drawn while the other is collected.

import { packCamera } from "./wire.js";

const LOST_AFTER = 2_000; // an answer that has not come by then will not; go on with the newest picture
const QUALITY = 0.82;
const LARGEST = 1024; // pixels of the longer side that is sent

export class Camera {
  /** `before` is the canvas that shows the picture which the newest answer answers. */
  constructor(live, before) {
    this.live = live;
    this.before = before;
    this.video = document.createElement("video");
    this.video.muted = true;
    this.video.playsInline = true;
    this.video.loop = true;
    this.canvas = document.createElement("canvas");
    this.pending = []; // on their way, without an answer: {time, bitmap, sent}, the oldest first
    this.answered = null; // the last of them whose answer has come, until that is drawn
    this.due = 0;
    this.single = false; // one picture is wanted while the stream is paused
    this.url = null;
  }

  get ready() {
    return this.video.readyState >= 2 && this.video.videoWidth > 0;
  }

  /** Ask for the camera. Throws an Error whose message says what to do. */
  async openCamera() {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("The browser gives a camera only to localhost and to HTTPS pages. Open this page that way.");
    }
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 }, audio: false });
    } catch (error) {
      throw new Error(cameraTrouble(error));
    }
    this.release();
    stream.getVideoTracks()[0].addEventListener("ended", () => this.onended?.());
    this.video.srcObject = stream;
    await this.play();
  }

  async openFile(file) {
    this.release();
    this.url = URL.createObjectURL(file);
    this.video.src = this.url;
    try {
      await this.play();
    } catch {
      this.release();
      throw new Error(`${file.name} is not a video that this browser can play.`);
    }
  }

  async play() {
    await this.video.play();
    this.loop = {}; // a former source's loop ends here
    this.next(this.loop);
  }

  release() {
    this.loop = null;
    this.video.pause();
    this.video.srcObject?.getTracks().forEach((track) => track.stop());
    this.video.srcObject = null;
    this.video.removeAttribute("src");
    this.video.load();
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.forget();
  }

  forget() {
    for (const sent of [...this.pending, this.answered]) sent?.bitmap.close();
    this.pending = [];
    this.answered = null;
    this.due = 0;
  }

  next(loop) {
    const look = (now, about) => loop === this.loop && this.look(about?.captureTime);
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(look);
    else requestAnimationFrame(look);
  }

  /** How many pictures may be unanswered. */
  get most() {
    const { pictures } = this.live.welcome;
    return pictures > 1 ? 2 * pictures : 1;
  }

  /** The source has a new picture: send it if the model can take one. A camera knows when it `captured` it. */
  look(captured) {
    this.next(this.loop);
    const now = performance.now();
    const { connection, mode, running } = this.live;
    const wanted = mode === "camera" && (running || this.single);
    if (!wanted || !connection.isOpen || this.busy || connection.backlog) return;
    if (this.pending.length && now - this.pending.at(-1).sent > LOST_AFTER) this.forget();
    if (this.pending.length >= this.most) return;
    // A camera at the model's own rate comes now a little early, now a little late: on the whole it keeps its rate.
    const period = 1000 / this.live.welcome.rate;
    if (now < this.due - period / 2) return;
    this.due = Math.max(this.due, now - period) + period;
    this.single = false;
    this.capture(captured ?? now);
  }

  async capture(time) {
    this.busy = true;
    try {
      this.draw();
      const bitmap = await createImageBitmap(this.canvas);
      const picture = await new Promise((resolve) => this.canvas.toBlob(resolve, "image/jpeg", QUALITY));
      this.pending.push({ time, bitmap, sent: performance.now() });
      this.live.connection.sendBinary(packCamera(time, picture));
    } finally {
      this.busy = false;
    }
  }

  /** Cut the picture to the model's shape around the middle. */
  draw() {
    const [height, width] = this.live.welcome.size;
    const scale = Math.min(1, LARGEST / Math.max(height, width));
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const { videoWidth, videoHeight } = this.video;
    const part = Math.min(videoWidth / width, videoHeight / height);
    const [w, h] = [width * part, height * part];
    const context = this.canvas.getContext("2d", { alpha: false });
    context.imageSmoothingQuality = "high";
    const { width: cw, height: ch } = this.canvas;
    context.drawImage(this.video, (videoWidth - w) / 2, (videoHeight - h) / 2, w, h, 0, 0, cw, ch);
  }

  /** The answer to the pictures captured up to `time` has come: the next may go. */
  arrived(time) {
    while (this.pending.length && this.pending[0].time <= time) {
      this.answered?.bitmap.close();
      this.answered = this.pending.shift();
    }
  }

  /** That answer is on the canvas: show beside it what it answers. */
  drawn(time) {
    if (!this.answered || this.answered.time > time) return;
    const { bitmap } = this.answered;
    this.answered = null;
    this.before.width = bitmap.width;
    this.before.height = bitmap.height;
    this.before.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
  }
}

function cameraTrouble(error) {
  if (error.name === "NotAllowedError") return "The camera was not allowed. Allow it in the address bar, then try again.";
  if (error.name === "NotFoundError") return "No camera was found. Plug one in, or choose a video file.";
  if (error.name === "NotReadableError") return "Another program holds the camera. Close it, then try again.";
  return `The camera did not start: ${error.message}`;
}
