// An empty canvas, as dense as the screen and as large as it is shown; null while it is not.

export function blank(canvas) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return null;
  const dense = devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  return { context, width, height, style: getComputedStyle(canvas) };
}
