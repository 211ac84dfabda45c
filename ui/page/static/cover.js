// What lies over the picture while there is none to watch: one title, one sentence, one button.

const ENDED = {
  token: ["This server asks for its token", "Reload the page and enter the token that the server printed.", "Reload"],
  origin: ["This page may not connect", "Open the page at the address that the server printed.", "Try again"],
  idle: ["The session has ended", "Nothing happened for a while, so its place went to others.", "Begin again"],
  taken: ["The session is open elsewhere", "Another window has taken it up.", "Take it back"],
  protocol: ["The page and the server do not match", "Reload the page; one of them is newer.", "Reload"],
  size: ["The connection was closed", "A message was larger than the server takes.", "Try again"],
};

/** {title, text, button, action} for the state of `live`, or null where the picture speaks for itself. */
export function coverFor(live, { drawn, sourceOpen }) {
  const { state, mode } = live;
  if (state.name === "ended") {
    const [title, text, button] = ENDED[state.why];
    return { title, text: state.message || text, button, action: button === "Reload" ? "reload" : "again" };
  }
  if (state.name === "queued") {
    const text = `You are number ${state.position} in the queue. The page goes on by itself.`;
    return { title: "All places are taken", text };
  }
  if (state.name === "waiting") {
    const text = state.message || `Trying again in ${Math.max(1, Math.round(state.seconds))} s.`;
    return { title: "The connection was lost", text, button: "Try now", action: "again" };
  }
  if (state.name !== "open") return { title: "Connecting …", text: "" };
  if (mode === "camera" && !sourceOpen) {
    const text = "See yourself drawn by the model. Nothing is stored unless you record.";
    return { title: "Camera", text, button: "Use the camera", action: "camera" };
  }
  if (live.running || drawn) return null;
  return { title: live.welcome?.model ?? "", text: invitation(live), button: "Start", action: "start" };
}

function invitation({ mode, welcome }) {
  if (mode === "camera") return "The source is ready.";
  if (welcome?.resumed) return "It goes on where you left it.";
  return welcome && Object.keys(welcome.keys ?? {}).length ? "Walk with the keys, change the world with words." : "";
}
