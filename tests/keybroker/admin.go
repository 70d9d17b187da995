package keybroker

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"

	"github.com/confidential-node/agent/firmware/contract"
	"github.com/confidential-node/agent/tests/keybroker/brokeradmin"
)

// AdminHandler serves the tenant's API below brokeradmin.PathPrefix.
func (s *Server) AdminHandler() http.Handler {
	const launch = brokeradmin.PathPrefix + "launches/{launch}"
	const resource = launch + "/resources/{repository}/{type}/{tag}"
	mux := http.NewServeMux()
	mux.HandleFunc("PUT "+launch, s.handle(brokeradmin.MaxLaunchBytes, s.admin, s.putLaunch))
	mux.HandleFunc("GET "+launch, s.handle(0, s.admin, s.getLaunch))
	mux.HandleFunc("DELETE "+launch, s.handle(0, s.admin, s.deleteLaunch))
	mux.HandleFunc("PUT "+resource, s.handle(brokeradmin.MaxResourceBytes, s.admin, s.putResource))
	mux.HandleFunc("DELETE "+resource, s.handle(0, s.admin, s.deleteResource))
	return mux
}

// admin lets only the bearer of the admin token pass. Digests are compared, so
// that time tells nothing about length or content.
func (s *Server) admin(r *http.Request) error {
	want := sha256.Sum256([]byte(s.cfg.AdminToken))
	bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	got := sha256.Sum256([]byte(bearer))
	if subtle.ConstantTimeCompare(want[:], got[:]) != 1 {
		return contract.Refuse("broker.admin-unauthorized", "send the broker's admin token", "the admin token is missing or wrong")
	}
	return nil
}

func (s *Server) putLaunch(w http.ResponseWriter, r *http.Request, body []byte) error {
	var l brokeradmin.Launch
	defer clear(body)
	if err := contract.UnmarshalStrict(body, brokeradmin.MaxLaunchBytes, &l); err != nil {
		return contract.Refuse("broker.registration-malformed", "send one JSON launch registration", "the registration is malformed").Because(err)
	}
	id := r.PathValue("launch")
	if err := s.launches.put(id, &l); err != nil {
		return err
	}
	s.log.Info("launch registered", "launch_id", id, "digests", len(l.LaunchDigests), "resources", len(l.Resources), "releases", maxReleases(&l))
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) getLaunch(w http.ResponseWriter, r *http.Request, _ []byte) error {
	launch, refused := s.launches.get(r.PathValue("launch"))
	if refused != nil {
		return refused
	}
	s.answer(w, launch.status())
	return nil
}

func (s *Server) deleteLaunch(w http.ResponseWriter, r *http.Request, _ []byte) error {
	id := r.PathValue("launch")
	if err := s.launches.remove(id); err != nil {
		return err
	}
	s.log.Info("launch deleted", "launch_id", id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) putResource(w http.ResponseWriter, r *http.Request, body []byte) error {
	if len(body) == 0 {
		return contract.Refuse("broker.registration-malformed", "send the resource's bytes as the body", "the resource is empty")
	}
	return s.changeResource(w, r, false, func(id, name string) error { return s.launches.setResource(id, name, body) })
}

func (s *Server) deleteResource(w http.ResponseWriter, r *http.Request, _ []byte) error {
	return s.changeResource(w, r, true, s.launches.withdrawResource)
}

func (s *Server) changeResource(w http.ResponseWriter, r *http.Request, withdrawn bool, change func(id, name string) error) error {
	name, refused := parseResourcePath(r.PathValue("repository") + "/" + r.PathValue("type") + "/" + r.PathValue("tag"))
	if refused != nil {
		return refused
	}
	id := r.PathValue("launch")
	if err := change(id, name.Path()); err != nil {
		return err
	}
	s.log.Info("resource changed", "launch_id", id, "resource", name.Path(), "withdrawn", withdrawn)
	w.WriteHeader(http.StatusNoContent)
	return nil
}
