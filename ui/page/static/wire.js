// The binary messages of the socket. Numbers are little-endian; see docs/serving.md for the layout.

export const PROTOCOL = 1;

const CAMERA = 1;
const VIDEO = 2;
const AUDIO = 3;
const FORMATS = ["image/jpeg", "image/webp"];
const VIDEO_HEADER = 24;
const AUDIO_HEADER = 28;

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

/** Samples of one channel, or null if it is not sound that this page can play. */
export function unpackAudio(buffer) {
  if (buffer.byteLength <= AUDIO_HEADER) return null;
  const header = new DataView(buffer, 0, AUDIO_HEADER);
  if (header.getUint8(0) !== AUDIO || header.getUint8(1) !== 0 || header.getUint16(2, true) !== 1) return null;
  return {
    version: header.getUint32(4, true),
    start: Number(header.getBigUint64(8, true)),
    rate: header.getUint32(24, true),
    samples: new Int16Array(buffer, AUDIO_HEADER),
  };
}
