// Captions pictures with the files of export_onnx.py and onnxruntime-web, as sample.py does greedily.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { squash } from "./resize.js";

ort.env.wasm.numThreads = 1;                    // more need headers that a plain file server does not send

export class Captioner {
  // Loads config.json, tokenizer.json, encoder.onnx and decoder.onnx from `folder`.
  static async load(folder) {
    const json = async name => (await get(`${folder}/${name}`)).json();
    const bytes = async name => (await get(`${folder}/${name}`)).arrayBuffer();
    const made = new Captioner();
    [made.config, made.tokenizer] = await Promise.all([json("config.json"), json("tokenizer.json")]);
    made.encoder = await ort.InferenceSession.create(await bytes("encoder.onnx"));
    made.decoder = await ort.InferenceSession.create(await bytes("decoder.onnx"));
    made.tokens = made.tokenizer.ranks.map(base64 => Uint8Array.from(atob(base64), sign => sign.charCodeAt()));
    return made;
  }

  // A picture (a Blob) -> its greedy caption; `onText` is called with what there is after each token.
  async caption(picture, onText = () => {}, maxLength = 50) {
    const { image_size: S, n_layer, n_head, head_width, n_positions, eos_id } = this.config;
    const pixels = new ort.Tensor("uint8", await readPixels(picture, S), [1, S, S, 3]);
    const { visual } = await this.encoder.run({ pixels });
    let cache = new ort.Tensor("float32", new Float32Array(0), [n_layer, 2, 1, n_head, 0, head_width]);
    const tokens = [];
    let newest = eos_id;
    while (tokens.length < Math.min(maxLength, n_positions - 1)) {
      const token = new ort.Tensor("int64", BigInt64Array.of(BigInt(newest)), [1, 1]);
      const { logits, new_cache } = await this.decoder.run({ token, cache, visual });
      newest = logits.data.reduce((best, value, i, all) => (value > all[best] ? i : best), 0);
      if (newest === eos_id) break;
      tokens.push(newest);
      cache = new_cache;
      onText(this.decode(tokens));
    }
    return this.decode(tokens);
  }

  // Byte-level BPE: the bytes of the tokens, end to end, are UTF-8.
  decode(tokens) {
    const bytes = tokens.flatMap(token => [...this.tokens[token]]);
    return new TextDecoder().decode(Uint8Array.from(bytes)).trim();
  }
}

async function get(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is missing: python export_onnx.py writes it`);
  return answer;
}

// A Blob -> size x size x 3 bytes, upright, transparency over white. Throws if the browser cannot read it.
export async function readPixels(picture, size) {
  const image = await createImageBitmap(picture, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(image.width, image.height);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, image.width, image.height);
  pen.drawImage(image, 0, 0);
  const rgba = pen.getImageData(0, 0, image.width, image.height).data;
  const rgb = rgba.filter((_, i) => i % 4 < 3);
  return squash(rgb, image.width, image.height, size);
}
