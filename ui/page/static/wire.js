// The binary messages of the socket. Numbers are little-endian; see docs/serving.md for the layout.

export const PROTOCOL = 1;

const CAMERA = 1;
const VIDEO = 2;
const FORMATS = ["image/jpeg", "image/webp"];
const VIDEO_HEADER = 24;

/** A camera frame: its capture time in this page's milliseconds, then the encoded picture. */
export function packCamera(time, picture) {
  const header = new DataView(new ArrayBuffer(9));
  header.setUint8(0, CAMERA);
  header.setFloat64(1, time, true);
  return new Blob([header, picture]);
}

/** What a binary message holds, or null if it is not a picture that this page can draw. */
export function unpackVideo(buffer) {
  if (buffer.byteLength <= VIDEO_HEADER) return null;
  const header = new DataView(buffer, 0, VIDEO_HEADER);
  const type = FORMATS[header.getUint8(1)];
  if (header.getUint8(0) !== VIDEO || !type) return null;
  return {
    version: header.getUint32(4, true),
    number: Number(header.getBigUint64(8, true)),
    time: header.getFloat64(16, true),
    picture: { type, data: new Uint8Array(buffer, VIDEO_HEADER) },
  };
}
