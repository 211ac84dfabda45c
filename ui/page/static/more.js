// What few need: steps, guidance, and how the camera's pictures are treated.

const ALIKE = 0.98; // likeness from which a picture may be skipped

const READ = {
  num_inference_steps: ({ value }) => (value === "" ? null : Math.max(1, Math.round(Number(value)))),
  guidance_scale: ({ value }) => Math.max(0, Number(value)),
  follow_motion: ({ value }) => Number(value),
  skip_similar: ({ checked }) => (checked ? ALIKE : null),
};

export class More {
  constructor(root, live) {
    this.root = root;
    this.live = live;
    this.changed = new Set(); // what a fresh session has to be told again
    root.addEventListener("change", (event) => {
      this.changed.add(event.target.name);
      this.steer([event.target.name]);
    });
    live.addEventListener("welcome", ({ detail }) => this.welcomed(detail));
  }

  /** Only what this model heeds, in this mode, is offered. */
  welcomed(welcome) {
    for (const label of this.root.querySelectorAll("[data-heeds]")) {
      const fits = welcome.mode === "camera" || !label.classList.contains("camera-only");
      label.hidden = !fits || !this.live.heeds(label.dataset.heeds);
    }
    this.root.hidden = !this.root.querySelector("[data-heeds]:not([hidden])");
    if (!welcome.resumed) this.steer([...this.changed]);
  }

  steer(names) {
    const offered = names.map((name) => this.root.querySelector(`[name=${name}]`)).filter((input) => !input.closest("[hidden]"));
    if (!offered.length) return;
    this.live.steer(Object.fromEntries(offered.map((input) => [input.name, READ[input.name](input)])));
  }
}
