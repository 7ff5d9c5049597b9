// llama.cpp for our own server: a line of JSON in, a line of JSON out. `node llama.mjs PACKAGE MODEL.gguf THREADS`
// PACKAGE is the directory of node-llama-cpp, whose prebuilt binary computes; nothing is built or downloaded here.
import {createInterface} from "node:readline";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [, , folder, modelPath, threads] = process.argv;
const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");

async function answer(model, sequence, asked) {
    if (asked.encode !== undefined) {
        const ids = model.tokenize(asked.encode, true);
        const begin = model.tokens.shouldPrependBosToken && ids[0] !== model.tokens.bos;
        return {ids: begin ? [model.tokens.bos, ...ids] : ids};
    }
    if (asked.decode !== undefined) return {text: model.detokenize(asked.decode)};
    await sequence.clearHistory(); // every request begins anew, so that no answer depends on the one before
    const ids = [];
    const options = {temperature: asked.temperature, topP: asked.top_p, topK: 0, minP: 0, yieldEogToken: true};
    if (asked.seed !== null) options.seed = asked.seed;
    for await (const token of sequence.evaluate(asked.generate, options)) {
        if (model.isEogToken(token) && !asked.ignore_end) return {ids, ended: true};
        ids.push(token);
        if (ids.length >= asked.limit) break;
    }
    return {ids, ended: false};
}

try {
    const {getLlama} = await import(pathToFileURL(join(folder, "dist", "index.js")));
    const llama = await getLlama({build: "never", gpu: false, logger: (level, text) => console.error(text)});
    const model = await llama.loadModel({modelPath});
    const context = await model.createContext({contextSize: model.trainContextSize, threads: Number(threads)});
    const sequence = context.getSequence();
    say({context: context.contextSize, vocabulary: model.fileInfo.metadata.tokenizer.ggml.tokens.length});
    for await (const line of createInterface({input: process.stdin})) {
        try {
            say(await answer(model, sequence, JSON.parse(line)));
        } catch (error) {
            say({error: String(error.message ?? error).split("\n")[0]});
        }
    }
    process.exit(0);
} catch (error) {
    say({error: String(error.message ?? error).split("\n")[0]});
    process.exit(1);
}
