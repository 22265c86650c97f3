// Package policies asks Kubernetes' own ValidatingAdmissionPolicy plugin what the policies of deploy/admission allow.
//
// It is built from Debian's packages of Kubernetes' source: cargo xtask test policies.
package policies

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/util/compatibility"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/component-base/featuregate"
)

const folder = "../../deploy/admission"

// A request that comes to admission; old is nil when something is created.
type request struct {
	name        string
	allowed     bool
	new, old    runtime.Object
	subresource string
	groups      []string
}

var (
	namespaces = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	endpoints  = schema.GroupVersionResource{Version: "v1", Resource: "endpoints"}
	slices     = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}

	tenants = []string{"developers", "system:authenticated"}
	masters = []string{"system:masters", "system:authenticated"}
)

type annotations map[string]string

func namespace(annotations annotations) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Annotations: annotations}}
}

func slice(kind discoveryv1.AddressType, addresses ...string) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: "orders", Namespace: "shop"}, AddressType: kind,
	}
	for _, address := range addresses {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	return slice
}

func subset(ready, notReady []string) *corev1.Endpoints {
	list := func(addresses []string) (list []corev1.EndpointAddress) {
		for _, address := range addresses {
			list = append(list, corev1.EndpointAddress{IP: address})
		}
		return list
	}
	return &corev1.Endpoints{
		ObjectMeta: metav1.ObjectMeta{Name: "orders", Namespace: "shop"},
		Subsets:    []corev1.EndpointSubset{{Addresses: list(ready), NotReadyAddresses: list(notReady)}},
	}
}

// many makes n addresses of the longest kind.
func many(n int) (addresses []string) {
	for i := range n {
		addresses = append(addresses, fmt.Sprintf("2001:db8:1234:5678:abcd:ef01:2345:%x", i))
	}
	return addresses
}

func TestAnnotationsOfNamespacesAreForThoseWhoGiveOutRoles(t *testing.T) {
	const permitted, imdsv2 = "iam.amazonaws.com/permitted", "iam.amazonaws.com/imdsv2"
	administrators := []string{"kiam-administrators"}
	plain, set := namespace(nil), namespace(annotations{permitted: "reader"})
	all := namespace(annotations{permitted: ".*"})
	check(t, namespaces, []request{
		{name: "none", allowed: true, new: plain, groups: tenants},
		{name: "others", allowed: true, new: namespace(annotations{"a/b": "c"}), groups: tenants},
		{name: "of a longer domain", allowed: true, new: namespace(annotations{"iam.amazonaws.com.example/a": "b"}), groups: tenants},
		{name: "set at creation", new: set, groups: tenants},
		{name: "another of ours", new: namespace(annotations{imdsv2: "required"}), groups: tenants},
		{name: "set by nobody's group", new: set},
		{name: "set by a master", allowed: true, new: set, groups: masters},
		{name: "set by an administrator", allowed: true, new: set, groups: administrators},
		{name: "kept", allowed: true, old: set, new: namespace(annotations{permitted: "reader", "a/b": "c"}), groups: tenants},
		{name: "added", old: plain, new: set, groups: tenants},
		{name: "changed", old: set, new: all, groups: tenants},
		{name: "changed by an administrator", allowed: true, old: set, new: all, groups: administrators},
		{name: "removed", old: set, new: namespace(annotations{"a/b": "c"}), groups: tenants},
		{name: "the last one removed", old: set, new: plain, groups: tenants},
		{name: "added by status", old: plain, new: set, subresource: "status", groups: tenants},
		{name: "added by finalize", old: plain, new: set, subresource: "finalize", groups: tenants},
		{name: "a plain status", allowed: true, old: plain, new: plain, subresource: "status", groups: tenants},
	})
}

func TestEndpointsAreNoMetadataService(t *testing.T) {
	const v4, v6, names = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN
	good, empty := slice(v4, "10.0.0.1"), slice(v4)
	empty.Endpoints = []discoveryv1.Endpoint{}
	// As the control plane sends it.
	received := &discoveryv1.EndpointSlice{}
	wire, err := empty.Marshal()
	must(t, err)
	must(t, received.Unmarshal(wire))
	requests := []request{
		{name: "a pod", allowed: true, new: good},
		{name: "none", allowed: true, new: empty},
		{name: "none, in protobuf", allowed: true, new: received},
		{name: "a neighbour", allowed: true, new: slice(v4, "169.254.169.253")},
		{name: "a pod in IPv6", allowed: true, new: slice(v6, "fd00:ec2::253")},
		{name: "a name", allowed: true, new: slice(names, "example.com")},
		{name: "the second", new: slice(v4, "10.0.0.1", "169.254.169.254")},
		{name: "changed", old: good, new: slice(v4, "169.254.169.254")},
		{name: "of a master", new: slice(v4, "169.254.169.254"), groups: masters},
		{name: "as many as there can be", allowed: true, new: slice(v6, many(1000)...)},
		{name: "the last of many", new: slice(v6, append(many(999), "fd00:ec2::254")...)},
	}
	for _, address := range []string{
		"169.254.169.254", "169.254.169.0254", "localhost", "fd00:ec2::254", "FD00:0EC2:0:0:0:0:0:254",
		"64:ff9b::a9fe:a9fe", "64:ff9b::169.254.169.254", "2002:a9fe:a9fe::1",
		"::ffff:169.254.169.254", "::ffff:a9fe:a9fe",
	} {
		requests = append(requests, request{name: address, new: slice(v6, address)})
	}
	check(t, slices, requests)
}

func TestOldEndpointsAreNoMetadataServiceEither(t *testing.T) {
	good := subset([]string{"10.0.0.1"}, nil)
	check(t, endpoints, []request{
		{name: "a pod", allowed: true, new: good},
		{name: "none", allowed: true, new: &corev1.Endpoints{ObjectMeta: good.ObjectMeta}},
		{name: "the service", new: subset([]string{"169.254.169.254"}, nil)},
		{name: "the second", new: subset([]string{"10.0.0.1", "fd00:ec2::254"}, nil)},
		{name: "one that is not ready", new: subset(nil, []string{"fd00:ec2::254"})},
		{name: "changed", old: good, new: subset([]string{"::ffff:169.254.169.254"}, nil)},
		{name: "as many as there can be", allowed: true, new: subset(many(1000), nil)},
	})
}

func check(t *testing.T, resource schema.GroupVersionResource, requests []request) {
	plugin := plugin(t)
	for _, request := range requests {
		t.Run(request.name, func(t *testing.T) {
			kinds, _, err := scheme.Scheme.ObjectKinds(request.new)
			must(t, err)
			object, err := meta.Accessor(request.new)
			must(t, err)
			operation := admission.Create
			if request.old != nil {
				operation = admission.Update
			}
			attributes := admission.NewAttributesRecord(request.new, request.old, kinds[0], object.GetNamespace(),
				object.GetName(), resource, request.subresource, operation, nil, false,
				&user.DefaultInfo{Name: "somebody", Groups: request.groups})
			err = plugin.Validate(t.Context(), attributes, admission.NewObjectInterfacesFromScheme(scheme.Scheme))
			if (err == nil) != request.allowed {
				t.Errorf("allowed: %v, want %v: %v", err == nil, request.allowed, err)
			}
		})
	}
}

// nobody is an authorizer that no policy here asks.
type nobody struct{}

func (nobody) Authorize(context.Context, authorizer.Attributes) (authorizer.Decision, string, error) {
	return authorizer.DecisionDeny, "", nil
}

// plugin is the API server's, with the policies and bindings of the folder.
func plugin(t *testing.T) *validating.Plugin {
	objects := append(policies(t), namespace(nil))
	mapper := meta.NewDefaultRESTMapper(nil)
	for kind := range scheme.Scheme.AllKnownTypes() {
		mapper.Add(kind, meta.RESTScopeNamespace)
	}
	client := fake.NewClientset(objects...)
	factory := informers.NewSharedInformerFactory(client, 0)
	plugin, err := validating.NewPlugin(nil)
	must(t, err)
	initializer.New(client, dynamicfake.NewSimpleDynamicClient(scheme.Scheme), factory, nobody{},
		featuregate.NewFeatureGate(), compatibility.DefaultBuildEffectiveVersion(), t.Context().Done(), mapper,
	).Initialize(plugin)
	plugin.SetRESTMapper(mapper)
	must(t, plugin.ValidateInitialization())
	factory.Start(t.Context().Done())
	factory.WaitForCacheSync(t.Context().Done())
	// It knows the policies a moment after the caches do: once it refuses what they all refuse.
	bad := admission.NewAttributesRecord(slice(discoveryv1.AddressTypeIPv4, "169.254.169.254"), nil,
		discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), "shop", "orders", slices, "", admission.Create, nil,
		false, &user.DefaultInfo{})
	for range 100 {
		if plugin.Validate(t.Context(), bad, admission.NewObjectInterfacesFromScheme(scheme.Scheme)) != nil {
			return plugin
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the policies refuse nothing")
	return nil
}

func policies(t *testing.T) (objects []runtime.Object) {
	paths, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	must(t, err)
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	for _, path := range paths {
		if filepath.Base(path) == "kustomization.yaml" {
			continue
		}
		file, err := os.Open(path)
		must(t, err)
		for documents := yaml.NewYAMLReader(bufio.NewReader(file)); ; {
			document, err := documents.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			object, _, err := strict.Decode(document, nil, nil)
			must(t, err)
			switch object := object.(type) {
			case *admissionv1.ValidatingAdmissionPolicy:
				setDefaults(object.Spec.MatchConstraints)
			case *admissionv1.ValidatingAdmissionPolicyBinding:
				setDefaults(object.Spec.MatchResources)
			}
			objects = append(objects, object)
		}
	}
	return objects
}

// setDefaults does what the API server does for what a manifest leaves out.
func setDefaults(match *admissionv1.MatchResources) {
	if match == nil {
		return
	}
	equivalent, all := admissionv1.Equivalent, admissionv1.AllScopes
	if match.MatchPolicy == nil {
		match.MatchPolicy = &equivalent
	}
	if match.NamespaceSelector == nil {
		match.NamespaceSelector = &metav1.LabelSelector{}
	}
	if match.ObjectSelector == nil {
		match.ObjectSelector = &metav1.LabelSelector{}
	}
	for i := range match.ResourceRules {
		if match.ResourceRules[i].Scope == nil {
			match.ResourceRules[i].Scope = &all
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
