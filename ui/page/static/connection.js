// One socket that holds: hello and resume, answers to questions, clock pings, and coming back after a loss.

import { Clock } from "./clock.js";
import { PROTOCOL, unpackAudio, unpackVideo } from "./wire.js";

const FIRST_WAIT = 500;
const LONGEST_WAIT = 10_000;
const PINGS_AT_START = 5;
const PING_EVERY = 5_000;
const SILENCE = 12_000; // the server speaks at least once a second; a socket this quiet is half open
const AWAY = 4000;
const ANSWER_WITHIN = 30_000;
const FINAL = { 4400: "protocol", 4401: "token", 4403: "origin", 4408: "idle", 4409: "taken", 4413: "size" };

/**
 * Events: "state" {name, ...}, "welcome", "status", "refused", "frame", "sound", "said".
 * States: closed, connecting, queued {position}, open, waiting {seconds}, ended {why, message}.
 */
export class Connection extends EventTarget {
  constructor(url, hello) {
    super();
    this.url = url;
    this.hello = hello;
    this.clock = new Clock();
    this.state = { name: "closed" };
    this.socket = null;
    this.questions = new Map();
    this.nextId = 1;
    this.wait = FIRST_WAIT;
    this.timers = {};
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  get isOpen() {
    return this.state.name === "open";
  }

  get backlog() {
    return this.socket?.bufferedAmount ?? 0;
  }

  open() {
    this.close();
    this.setState({ name: "connecting" });
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.bye = null;
    const mine = (handle) => (event) => socket === this.socket && handle(event);
    socket.onopen = mine(() => this.send({ type: "hello", protocol: PROTOCOL, ...this.hello() }));
    socket.onmessage = mine((event) => this.receive(event.data));
    socket.onclose = mine((event) => this.lost(event));
  }

  /** The server keeps the session of a socket that closes so for a while, unlike one that closes with 1000. */
  close() {
    const socket = this.socket;
    this.socket = null;
    this.rest();
    socket?.close(AWAY);
    this.setState({ name: "closed" });
  }

  /** Do not wait for the back-off to end: the network or the user is back. */
  hurry() {
    if (this.state.name === "waiting") this.open();
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  sendBinary(data) {
    if (this.isOpen && this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  /** Send and wait for the server's answer; rejects with its refusal, or when the socket is lost. */
  ask(message) {
    if (!this.isOpen) return Promise.reject(new Error("Not connected"));
    const id = this.nextId++;
    return new Promise((resolve, reject) => {
      const late = setTimeout(() => this.settle(id, "reject", new Error("The server did not answer")), ANSWER_WITHIN);
      this.questions.set(id, { resolve, reject, late });
      this.send({ ...message, id });
    });
  }

  settle(id, how, value) {
    const question = this.questions.get(id);
    if (!question) return false;
    this.questions.delete(id);
    clearTimeout(question.late);
    question[how](value);
    return true;
  }

  receive(data) {
    this.heard = performance.now();
    if (typeof data !== "string") {
      const frame = unpackVideo(data);
      const sound = frame ? null : unpackAudio(data);
      if (frame) this.emit("frame", frame);
      else if (sound) this.emit("sound", sound);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "done") this.settle(message.id, "resolve", message);
    else if (message.type === "pong") this.clock.answer(message.t, message.server, performance.now());
    else if (message.type === "welcome") this.welcomed(message);
    else if (message.type === "queued") this.setState({ name: "queued", position: message.position });
    else if (message.type === "bye") this.bye = message;
    else if (message.type === "refused") this.refused(message);
    else this.emit(message.type, message);
  }

  refused(message) {
    const error = new Error(message.message);
    if (!this.settle(message.id, "reject", error)) this.emit("refused", message);
  }

  welcomed(message) {
    this.wait = FIRST_WAIT;
    this.clock = new Clock();
    this.setState({ name: "open" });
    this.emit("welcome", message);
    for (let i = 0; i < PINGS_AT_START; i++) setTimeout(() => this.ping(), 40 * i);
    clearInterval(this.timers.ping);
    this.timers.ping = setInterval(() => this.beat(), PING_EVERY);
  }

  ping() {
    this.send({ type: "ping", t: performance.now() });
  }

  beat() {
    if (performance.now() - this.heard > SILENCE) this.lost({ code: 1006, reason: "silence" });
    else this.ping();
  }

  lost(event) {
    const socket = this.socket;
    this.socket = null;
    this.rest();
    socket?.close();
    const why = FINAL[event.code];
    const message = this.bye?.message || event.reason || "";
    if (why) {
      this.setState({ name: "ended", why, message });
      return;
    }
    const wait = this.wait * (0.8 + 0.4 * Math.random());
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
    this.timers.retry = setTimeout(() => this.open(), wait);
    this.setState({ name: "waiting", seconds: wait / 1000, message });
  }

  rest() {
    clearInterval(this.timers.ping);
    clearTimeout(this.timers.retry);
    for (const id of [...this.questions.keys()]) this.settle(id, "reject", new Error("The connection was lost"));
  }

  setState(state) {
    this.state = state;
    this.emit("state", state);
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** The address of a socket of this server, which may stand behind a proxy. */
export function socketUrl(name) {
  const url = new URL(name, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  return url;
}
