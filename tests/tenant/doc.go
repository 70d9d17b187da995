// Package tenant is the tenant's side of a confidential deployment: it makes
// keys, seals inputs before they leave the machine, writes the manifest,
// predicts the launch digest from the tenant's own copy of the guest image,
// registers keys and policy at the tenant's key broker, asks the control plane
// for the guest, verifies evidence, and opens results that the attested guest
// signed.
//
// It owns the state folder (0700):
//
//	deployments/NAME/deployment.json   what was deployed, see Deployment
//	deployments/NAME/manifest.json     canonical manifest
//	deployments/NAME/data.key          key of the inputs, as registered
//	deployments/NAME/results.key       age identity that opens the results
//	deployments/NAME/evidence.json     latest evidence that verified
//	objects.json                       digests of objects this tool uploaded
//
// It must never upload plaintext, never log a key or a presigned URL, and
// never take an expectation from the evidence it verifies, from the control
// plane or from the object store. A result that is not signed under the key
// of verified evidence does not exist for it.
//
// A Tenant may be used concurrently for different deployments; two calls for
// the same deployment must not overlap.
package tenant
