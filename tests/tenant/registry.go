package tenant

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/confidential-node/agent/firmware/contract"
)

// resolver turns an image reference into host/repository@sha256:digest.
type resolver interface {
	Resolve(ctx context.Context, ref string) (string, error)
}

type registry struct {
	host      string
	transport http.RoundTripper
}

func newRegistry(p *EndpointProfile) (*registry, error) {
	if err := need(map[string]string{"registry.url": p.URL, "registry.ca_file": p.CAFile}); err != nil {
		return nil, err
	}
	transport, err := pinnedTransport(p.CAFile)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(p.URL)
	if err != nil {
		return nil, Usage("registry.url %q is not a URL", p.URL)
	}
	return &registry{u.Host, transport}, nil
}

// Resolve asks the registry for the linux/amd64 image behind a tag, or checks
// that a digest exists. A reference without host is of the profile's registry.
func (r *registry) Resolve(ctx context.Context, ref string) (string, error) {
	parsed, err := name.ParseReference(ref, name.WithDefaultRegistry(r.host))
	if err != nil {
		return "", Usage("image %q is not a reference: %v", ref, err)
	}
	if parsed.Context().RegistryStr() != r.host {
		return "", contract.Refuse("tenant.registry-mismatch", "push the image to the profile's registry, or change registry.url",
			"image %s is not in the profile's registry %s, the only one the guest will trust", ref, r.host)
	}
	image, err := remote.Image(parsed, remote.WithContext(ctx), remote.WithTransport(r.transport),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil {
		var status *transport.Error
		if errors.As(err, &status) && status.StatusCode == http.StatusNotFound {
			return "", contract.Refuse("tenant.image-not-found", "push the image first, or correct the reference", "the registry has no image %s", ref)
		}
		return "", fmt.Errorf("resolving image %s: %w", ref, err)
	}
	digest, err := image.Digest()
	if err != nil {
		return "", fmt.Errorf("resolving image %s: %w", ref, err)
	}
	return parsed.Context().RegistryStr() + "/" + parsed.Context().RepositoryStr() + "@" + digest.String(), nil
}
