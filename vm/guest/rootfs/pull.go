// Package rootfs pulls the workload's image by digest and unpacks it into a
// folder in memory. Every byte comes from parties that are not trusted until
// its digest holds: manifest, configuration and layers are compared with the
// digests that lead to them, and a layer can write nowhere but below the
// folder. One goroutine unpacks into one folder.
package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/vm/guest/pin"
)

// Pull resolves the reference at its registry. Layers are fetched when they
// are unpacked.
func Pull(ctx context.Context, reference string, pinned http.RoundTripper) (v1.Image, error) {
	ref, err := name.NewDigest(reference)
	if err != nil {
		return nil, contract.Refuse("guest.image-reference", "name the image as host/repository@sha256:digest", "the image's reference is malformed").Because(err)
	}
	d, err := remote.Get(ref,
		remote.WithContext(ctx), remote.WithTransport(secure{pinned}), remote.WithAuth(authn.Anonymous),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil {
		return nil, pullError(err)
	}
	// The library believes the server's header for one old media type.
	if sum := sha256.Sum256(d.Manifest); ref.DigestStr() != "sha256:"+hex.EncodeToString(sum[:]) {
		return nil, mismatch(errors.New("manifest has another digest"))
	}
	img, err := d.Image()
	if err != nil {
		return nil, pullError(err)
	}
	return img, nil
}

// secure makes every request HTTPS. The library takes plain HTTP for private
// addresses; the manifest's registry is always https, and pinned.
type secure struct{ next http.RoundTripper }

func (s secure) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme == "http" {
		r = r.Clone(r.Context())
		r.URL.Scheme = "https"
	}
	return s.next.RoundTrip(r)
}

// pullError tells a registry that says no from one that cannot be reached and
// from one that sends something else.
func pullError(err error) error {
	var answer *transport.Error
	switch {
	case errors.Is(err, pin.ErrUnpinned):
		return err
	case errors.As(err, &answer):
		return contract.Refuse("guest.image-refused", "push the image to the manifest's registry, readable without login",
			"the registry refused the image with status %d", answer.StatusCode).Because(err)
	case isMismatch(err):
		return mismatch(err)
	}
	return contract.Refuse("guest.image-unreachable", "check that the registry is reachable from the node and its pin is right",
		"the image could not be pulled").Because(err)
}

func mismatch(err error) error {
	return contract.Refuse("guest.image-digest-mismatch", "push the image again, or name the digest that is meant",
		"the registry sends something else than the image in the manifest").Because(err)
}

// Process is how an image wants to be run.
type Process struct {
	Args []string
	Env  []string
	Dir  string
	User string
}

// Configuration reads how to run an image. A command of the manifest replaces
// entry point and arguments.
func Configuration(img v1.Image, command []string) (Process, error) {
	file, err := img.ConfigFile()
	if err != nil {
		return Process{}, pullError(fmt.Errorf("fetching image configuration: %w", err))
	}
	p := Process{Env: file.Config.Env, Dir: file.Config.WorkingDir, User: file.Config.User, Args: command}
	if len(command) == 0 {
		p.Args = append(append([]string{}, file.Config.Entrypoint...), file.Config.Cmd...)
	}
	if len(p.Args) == 0 {
		return Process{}, contract.Refuse("guest.image-no-command", "give the image an entry point or the manifest a command", "neither image nor manifest says what to run")
	}
	if p.Dir == "" {
		p.Dir = "/"
	}
	return p, nil
}
