// The prompt line, the world buttons, the strength slider, and the hint that names the nearest world.

const PAUSE = 80; // milliseconds between two strengths while the slider moves

export class Words {
  constructor(root, live, { focus }) {
    this.live = live;
    this.focus = focus;
    this.form = root.querySelector(".prompt");
    this.line = this.form.elements.prompt;
    this.hint = root.querySelector(".hint");
    this.worlds = root.querySelector(".worlds");
    this.section = root.querySelector(".worlds-section");
    this.strength = root.querySelector(".strength");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.apply(this.line.value.trim());
    });
    this.line.addEventListener("input", () => this.showHint());
    addEventListener("keydown", (event) => this.shortcut(event));
    this.strength.addEventListener("input", () => this.showStrength());
    live.addEventListener("welcome", ({ detail }) => this.welcomed(detail));
    live.addEventListener("status", () => this.showHint());
    live.addEventListener("steered", () => this.showHint());
    live.addEventListener("ordered", () => this.showPrompt());
    live.addEventListener("prompted", () => this.showPrompt());
  }

  get applied() {
    return this.live.prompt;
  }

  welcomed(welcome) {
    const worlds = welcome.worlds ?? [];
    this.section.hidden = !worlds.length;
    this.worlds.replaceChildren(...worlds.map((world) => this.worldButton(world)));
    this.line.value = this.applied;
    this.line.placeholder = worlds[0] ?? "what shall it draw?";
    this.strength.closest(".strength-part").hidden = !this.live.heeds("strength");
    if (this.live.mode === "camera" && this.live.heeds("strength")) {
      this.live.steer({ strength: Number(this.strength.value) });
    }
    this.showHint();
  }

  /** Going back, to another branch, or past an entry of the timeline brings a prompt with it. */
  showPrompt() {
    if (document.activeElement !== this.line) this.line.value = this.applied;
    this.showHint();
  }

  worldButton(world) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "world";
    button.textContent = world;
    button.addEventListener("click", (event) => this.apply(world, event.detail > 0));
    return button;
  }

  /** Send the prompt; on success the keys steer again. */
  async apply(prompt, focus = true) {
    if (!prompt) return;
    this.line.value = prompt;
    if ((await this.live.steer({ prompt })) && focus) this.focus();
  }

  /** "/" goes to the prompt line from anywhere; Escape goes back to the picture. */
  shortcut(event) {
    const typing = event.target instanceof Element && event.target.closest("input, textarea, select");
    if (event.key === "/" && !typing && !this.form.closest("[hidden]")) {
      event.preventDefault();
      this.line.focus();
      this.line.select();
    } else if (event.key === "Escape" && event.target === this.line) {
      this.line.value = this.applied;
      this.focus();
    }
  }

  showStrength() {
    const value = Number(this.strength.value);
    this.strength.nextElementSibling.textContent = value.toFixed(2);
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = null;
      this.live.steer({ strength: Number(this.strength.value) });
    }, PAUSE);
  }

  showHint() {
    for (const button of this.worlds.children) {
      button.setAttribute("aria-pressed", button.textContent === this.applied);
    }
    const typed = this.line.value.trim();
    const { nearest } = this.live.status;
    if (typed && typed !== this.applied) this.hint.textContent = "Enter applies it.";
    else if (nearest && nearest.world !== this.applied) this.hint.textContent = `Nearest world: “${nearest.world}” (${nearest.similarity.toFixed(2)})`;
    else this.hint.textContent = this.applied ? "Applied." : "Enter applies it.";
  }
}
