package outside

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry serves OCI images from memory.
func Registry() http.Handler {
	return registry.New(registry.Logger(log.New(io.Discard, "", 0)))
}

// Push puts an image at host/repository:tag and returns it pinned by digest.
func Push(ctx context.Context, reference string, image v1.Image, client *http.Client) (pinned string, err error) {
	tag, err := name.NewTag(reference)
	if err != nil {
		return "", fmt.Errorf("pushing image: %w", err)
	}
	if err := remote.Write(tag, image, remote.WithContext(ctx), remote.WithTransport(client.Transport)); err != nil {
		return "", fmt.Errorf("pushing image: %w", err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("pushing image: %w", err)
	}
	return tag.Context().Digest(digest.String()).Name(), nil
}

// Serve answers on addr with TLS 1.3 until ctx ends.
func Serve(ctx context.Context, addr string, cert tls.Certificate, handler http.Handler) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}},
	}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() {
		if err := server.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
			log.Printf("service on %s ended: %v", addr, err)
		}
	}()
	return nil
}
