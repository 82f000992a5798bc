// What llama.cpp computes of GGUF files: node llama_cpp_worker.mjs CASES.json ANSWERS.json
import fs from "fs";
import {getLlama} from "node-llama-cpp";

const [from, to] = process.argv.slice(2);
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error"
});
const answers = [];
for (const {file, ids, texts} of JSON.parse(fs.readFileSync(from))) {
    const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
    const context = await model.createContext({
        contextSize: 256, sequences: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
    });
    const all = {temperature: 1, topK: 0, topP: 1, minP: 0};
    const asked = {generateNext: {probabilities: true, options: all}};
    const said = await context.getSequence().controlledEvaluate(ids.map((id) => [id, asked]));
    const probabilities = said.map(({next}) => {
        const row = new Array(next.probabilities.size).fill(0);
        for (const [id, value] of next.probabilities) row[id] = value;
        return row;
    });
    answers.push({probabilities, ids: texts.map((text) => model.tokenize(text, false))});
    await context.dispose();
    await model.dispose();
}
fs.writeFileSync(to, JSON.stringify(answers));
process.exit(0);
