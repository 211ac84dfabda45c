// The model picker: what is offered, and what it will take in memory, told before anything is loaded.

const size = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);

export class Picker {
  /** `server` holds the page's Python functions `models`, `plan` and `load`. */
  constructor(root, button, server, { loaded, notice }) {
    Object.assign(this, { root, button, server, loaded, notice });
    this.form = root.querySelector("form");
    this.plan = root.querySelector(".plan");
    this.go = root.querySelector(".go");
    button.addEventListener("click", () => this.open());
    root.querySelector(".close").addEventListener("click", () => root.close());
    this.form.addEventListener("change", () => this.show());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
  }

  async open() {
    const offer = (this.offer = await this.server.models());
    this.fill("model", offer.models, offer.model);
    this.fill("recipe", offer.recipes, offer.recipe);
    this.fill("preset", offer.presets, offer.preset);
    this.root.showModal();
    await this.show();
  }

  fill(name, choices, chosen) {
    const select = this.form.elements[name];
    const all = [...new Set([chosen, ...choices])];
    select.replaceChildren(...all.map((choice) => new Option(choice || "the model's own", choice, false, choice === chosen)));
    select.closest("label").hidden = name !== "model" && all.length < 2;
  }

  get choice() {
    const { model, recipe, preset } = this.form.elements;
    return [model.value, recipe.value, preset.value];
  }

  async show() {
    const choice = this.choice;
    const plan = await this.server.plan(choice);
    if (choice.join() !== this.choice.join()) return;
    this.plan.replaceChildren(...this.rows(plan));
    const served = choice.join() === [this.offer.model, this.offer.recipe, this.offer.preset].join();
    this.go.hidden = !this.offer.can_load;
    this.go.disabled = served || !plan.fits;
    this.go.textContent = served ? "Being served" : plan.fits ? "Load" : "Does not fit";
    this.root.querySelector(".command").hidden = this.offer.can_load || served;
    this.root.querySelector(".command code").textContent = plan.command;
  }

  rows(plan) {
    const parts = [...Object.entries(plan.weights), ["memory of frames, per session", plan.cache]];
    const known = plan.total > 0;
    const rows = parts.filter(([, bytes]) => bytes > 0).map(([name, bytes]) => row(name.replaceAll("_", " "), size(bytes)));
    if (known) rows.push(row("together", size(plan.total), "sum"), bar(plan.total / plan.free));
    rows.push(row(`free: ${plan.device}`, size(plan.free)));
    if (plan.note) rows.push(row(plan.note, "", "note"));
    return rows;
  }

  async load() {
    this.go.disabled = true;
    this.go.textContent = "Loading …";
    const { error, model } = await this.server.load(this.choice);
    if (error) {
      this.notice(error, "bad");
      await this.show();
      return;
    }
    this.root.close();
    this.notice(`${model} is loaded`);
    this.loaded();
  }
}

function row(name, value, kind = "") {
  const element = document.createElement("div");
  element.className = `plan-row ${kind}`;
  const [left, right] = [document.createElement("span"), document.createElement("span")];
  left.textContent = name;
  right.textContent = value;
  element.append(left, right);
  return element;
}

function bar(part) {
  const element = document.createElement("div");
  element.className = part > 1 ? "meter over" : "meter";
  element.append(document.createElement("span"));
  element.firstChild.style.width = `${Math.min(100, Math.max(1, 100 * part))}%`;
  return element;
}
