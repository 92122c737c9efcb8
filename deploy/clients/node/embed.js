// Vectors of the texts that are given as arguments, by the service config in the folder above.
//
//   npm install @grpc/grpc-js @grpc/proto-loader
//   node embed.js dns:///embedserve.internal:50051 "hello world" "good night"
"use strict";
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PROTO = path.join(__dirname, "../../../proto/embedserve/v1/embedding.proto");
const OPTIONS = {
  "grpc.service_config": fs.readFileSync(path.join(__dirname, "../service_config.json"), "utf8"),
  // A peer that is gone without a word is noticed after 35 s; the server allows pings each 10 s.
  "grpc.keepalive_time_ms": 30000,
  "grpc.keepalive_timeout_ms": 5000,
  // Requests of more than 1 MiB are never retried unless there is room to keep them.
  "grpc.per_rpc_retry_buffer_size": 16 << 20,
};

const [target, ...texts] = process.argv.slice(2);
const { embedserve } = grpc.loadPackageDefinition(loader.loadSync(PROTO));
const client = new embedserve.v1.EmbeddingService(target, grpc.credentials.createInsecure(), OPTIONS);
client.Embed({ texts }, { deadline: Date.now() + 5000 }, (error, answer) => {
  if (error) {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
  } else {
    for (const { values } of answer.embeddings) {
      console.log(values.length, ...values.slice(0, 3).map((value) => value.toFixed(4)));
    }
  }
  client.close();
});
