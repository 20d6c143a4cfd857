// Pillow's bilinear resize to a square, in its fixed-point arithmetic: before Pillow 13 to the byte. Later ones
// begin with the height where that shrinks more, which moves some values by 1.

// width x height x 3 bytes -> size x size x 3 bytes.
export function squash(bytes, width, height, size) {
  const wide = resize(bytes, width, size, height, 3, width * 3);
  return resize(wide, height, size, size, size * 3, 3);
}

// Along one axis: `from` pixels, `step` bytes apart, become `to` pixels as far apart as the result asks; the same
// for each of `lines`, `stride` bytes apart. The filter is a triangle as wide as the shrinking, so that no pixel is
// skipped, which a canvas does not do.
function resize(bytes, from, to, lines, step, stride) {
  if (from === to) return bytes;
  const out = new Uint8Array(to * lines * 3), across = step === 3;
  const scale = from / to, width = Math.max(scale, 1);
  const [outStep, outStride] = across ? [3, to * 3] : [lines * 3, 3];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - width + 0.5), 0), end = Math.min(Math.trunc(centre + width + 0.5), from);
    const weights = [];
    for (let j = first; j < end; j++) weights.push(Math.max(0, 1 - Math.abs((j + 0.5 - centre) / width)));
    const sum = weights.reduce((a, b) => a + b);
    const fixed = weights.map(weight => Math.trunc((weight / sum) * 2 ** 22 + 0.5));
    for (let line = 0; line < lines; line++) {
      for (let colour = 0; colour < 3; colour++) {
        let total = 2 ** 21, at = line * stride + first * step + colour;
        for (const weight of fixed) {
          total += bytes[at] * weight;
          at += step;
        }
        out[line * outStride + i * outStep + colour] = Math.min(Math.floor(total / 2 ** 22), 255);
      }
    }
  }
  return out;
}
