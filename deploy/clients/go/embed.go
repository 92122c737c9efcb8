// Vectors of the texts that are given as arguments, by the service config in the folder above.
//
//	go run . dns:///embedserve.internal:50051 "hello world" "good night"
//
// The package pb is generated; the README of the folder above has the command.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/health" // without it healthCheckConfig does nothing
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "example.com/embed/pb"
)

func main() {
	config, err := os.ReadFile("../service_config.json")
	if err != nil {
		fail(err)
	}
	// Dial and WithInsecure are in every grpc-go 1.x; since 1.63 NewClient and insecure.NewCredentials are preferred.
	conn, err := grpc.Dial(os.Args[1], grpc.WithInsecure(),
		grpc.WithDefaultServiceConfig(string(config)),
		// A peer that is gone without a word is noticed after 35 s; the server allows pings each 10 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		// Requests of more than 256 KiB are never retried unless there is room to keep them.
		grpc.WithDefaultCallOptions(grpc.MaxRetryRPCBufferSize(16<<20)))
	if err != nil {
		fail(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	answer, err := pb.NewEmbeddingServiceClient(conn).Embed(ctx, &pb.EmbedRequest{Texts: os.Args[2:]})
	if err != nil {
		fail(err)
	}
	for _, embedding := range answer.Embeddings {
		fmt.Println(len(embedding.Values), embedding.Values[:3])
	}
}

// fail says what the server said; status.Convert(err).Details() holds ErrorInfo and RetryInfo.
func fail(err error) {
	fmt.Fprintf(os.Stderr, "%v: %s\n", status.Code(err), status.Convert(err).Message())
	os.Exit(1)
}
