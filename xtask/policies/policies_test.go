// Package policies asks Kubernetes' own ValidatingAdmissionPolicy plugin what the policies of deploy/ allow.
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
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
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

// What is in the folders, of policies and their bindings.
const (
	admissionRules = "../../deploy/admission"
	tokenRules     = "../../deploy/web-identity/rules"
	nodeRules      = "../../deploy/startup-taint/rules"
)

// A request that comes to admission; old is nil when something is created.
type request struct {
	name        string
	allowed     bool
	new, old    runtime.Object
	subresource string
	groups      []string
	// The user's name and what else its credentials say; of somebody where they are not set.
	user  string
	extra map[string][]string
}

var (
	namespaces = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	endpoints  = schema.GroupVersionResource{Version: "v1", Resource: "endpoints"}
	slices     = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	accounts   = schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}
	nodes      = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}

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
	check(t, plugin(t, admissionRules, badEndpoint), namespaces, []request{
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

// badEndpoint is what deploy/admission refuses whoever asks.
var badEndpoint = admission.NewAttributesRecord(slice(discoveryv1.AddressTypeIPv4, "169.254.169.254"), nil,
	discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), "shop", "orders", slices, "", admission.Create, nil, false,
	&user.DefaultInfo{})

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
	check(t, plugin(t, admissionRules, badEndpoint), slices, requests)
}

func TestOldEndpointsAreNoMetadataServiceEither(t *testing.T) {
	good := subset([]string{"10.0.0.1"}, nil)
	check(t, plugin(t, admissionRules, badEndpoint), endpoints, []request{
		{name: "a pod", allowed: true, new: good},
		{name: "none", allowed: true, new: &corev1.Endpoints{ObjectMeta: good.ObjectMeta}},
		{name: "the service", new: subset([]string{"169.254.169.254"}, nil)},
		{name: "the second", new: subset([]string{"10.0.0.1", "fd00:ec2::254"}, nil)},
		{name: "one that is not ready", new: subset(nil, []string{"fd00:ec2::254"})},
		{name: "changed", old: good, new: subset([]string{"::ffff:169.254.169.254"}, nil)},
		{name: "as many as there can be", allowed: true, new: subset(many(1000), nil)},
	})
}

const agent = "system:serviceaccount:kube-system:kiam-agent"

// on is what the agent's own token says of its node, from Kubernetes 1.30 on.
func on(node string) map[string][]string {
	return map[string][]string{"authentication.kubernetes.io/node-name": {node}}
}

func pod(name, node string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID("uid-of-" + name)},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: "orders"},
	}
}

// token is what the agent asks for on behalf of a pod, but for what change makes of it.
func token(pod string, change func(*authenticationv1.TokenRequest)) *authenticationv1.TokenRequest {
	life := int64(600)
	request := &authenticationv1.TokenRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "orders", Namespace: "shop"},
		Spec: authenticationv1.TokenRequestSpec{
			Audiences: []string{"sts.amazonaws.com"}, ExpirationSeconds: &life,
			BoundObjectRef: &authenticationv1.BoundObjectReference{
				Kind: "Pod", APIVersion: "v1", Name: pod, UID: types.UID("uid-of-" + pod),
			},
		},
	}
	if change != nil {
		change(request)
	}
	return request
}

func audiences(audiences ...string) func(*authenticationv1.TokenRequest) {
	return func(request *authenticationv1.TokenRequest) { request.Spec.Audiences = audiences }
}

func life(seconds *int64) func(*authenticationv1.TokenRequest) {
	return func(request *authenticationv1.TokenRequest) { request.Spec.ExpirationSeconds = seconds }
}

func bound(change func(*authenticationv1.BoundObjectReference)) func(*authenticationv1.TokenRequest) {
	return func(request *authenticationv1.TokenRequest) { change(request.Spec.BoundObjectRef) }
}

func both(first, second func(*authenticationv1.TokenRequest)) func(*authenticationv1.TokenRequest) {
	return func(request *authenticationv1.TokenRequest) {
		first(request)
		second(request)
	}
}

func TestTheAgentsTokensAreForAwsAndForPodsOfItsNode(t *testing.T) {
	const server = "https://kubernetes.default.svc"
	unbound := func(request *authenticationv1.TokenRequest) { request.Spec.BoundObjectRef = nil }
	elsewhere := func(request *authenticationv1.TokenRequest) { request.Namespace = "empty" }
	uid := func(uid types.UID) func(*authenticationv1.TokenRequest) {
		return bound(func(ref *authenticationv1.BoundObjectReference) { ref.UID = uid })
	}
	kind := func(kind string) func(*authenticationv1.TokenRequest) {
		return bound(func(ref *authenticationv1.BoundObjectReference) { ref.Kind = kind })
	}
	version := func(version string) func(*authenticationv1.TokenRequest) {
		return bound(func(ref *authenticationv1.BoundObjectReference) { ref.APIVersion = version })
	}
	seconds := func(seconds int64) func(*authenticationv1.TokenRequest) { return life(&seconds) }
	here := on("n1")
	requests := []request{
		{name: "a pod of the node", allowed: true, new: token("here", nil), extra: here},
		{name: "the same from another node", new: token("here", nil), extra: on("n2")},
		{name: "a pod of another node", new: token("there", nil), extra: here},
		{name: "the same from its node", allowed: true, new: token("there", nil), extra: on("n2")},
		{name: "a pod that no node has", new: token("pending", nil), extra: here},
		{name: "a pod that no node has, from no node", new: token("pending", nil), extra: on("")},
		// The API server itself refuses what these name.
		{name: "a pod that nobody knows", allowed: true, new: token("nobody", nil), extra: here},
		{name: "a pod here with the UID of one elsewhere", new: token("here", uid("uid-of-there")), extra: here},
		{name: "a namespace without pods", allowed: true, new: token("here", elsewhere), extra: here},
		{name: "the same, bound to nothing", new: token("here", both(elsewhere, unbound)), extra: here},
		{name: "the same, bound by name alone", new: token("here", both(elsewhere, uid(""))), extra: here},

		{name: "a token of the agent's that is bound to no pod", new: token("here", nil)},
		{name: "the same, for a pod that nobody knows", new: token("nobody", nil)},
		{name: "the same, for a pod that no node has", new: token("pending", nil)},
		{name: "the same, in a token that says other things", new: token("nobody", nil),
			extra: map[string][]string{"authentication.kubernetes.io/pod-name": {"kiam-agent-x"}}},

		{name: "the API server's audience", new: token("here", audiences(server)), extra: here},
		{name: "the default audience", new: token("here", audiences()), extra: here},
		{name: "another beside it", new: token("here", audiences("sts.amazonaws.com", server)), extra: here},
		{name: "another before it", new: token("here", audiences(server, "sts.amazonaws.com")), extra: here},

		{name: "a second longer", new: token("here", seconds(601)), extra: here},
		{name: "as long as the server likes", new: token("here", life(nil)), extra: here},

		{name: "bound to nothing", new: token("here", unbound), extra: here},
		{name: "bound by name alone", new: token("here", uid("")), extra: here},
		{name: "bound to a secret", new: token("here", kind("Secret")), extra: here},
		{name: "bound to a node", new: token("here", kind("Node")), extra: here},
		{name: "bound to a pod of another group", new: token("here", version("other/v1")), extra: here},
	}
	for i := range requests {
		requests[i].user = agent
	}
	anything := token("there", func(request *authenticationv1.TokenRequest) {
		request.Spec = authenticationv1.TokenRequestSpec{Audiences: []string{server}}
	})
	for _, name := range []string{
		"system:node:n1", "system:serviceaccount:shop:kiam-agent", "system:serviceaccount:kube-system:kiam-agent-2",
		"system:serviceaccount:kube-system:kube-controller-manager", "kiam-agent",
	} {
		requests = append(requests, request{name: "asked by " + name, allowed: true, new: anything, user: name})
	}
	requests = append(requests, request{
		name: "asked by somebody else, in a namespace without pods", allowed: true, new: token("here", both(elsewhere, unbound)),
	})
	for i := range requests {
		requests[i].subresource = "token"
	}
	objects := []runtime.Object{pod("here", "n1"), pod("there", "n2"), pod("pending", "")}
	check(t, plugin(t, tokenRules, requests[2].of(t, accounts), objects...), accounts, requests)
}

// taint is ours for an empty key.
func taint(key string, effect corev1.TaintEffect) corev1.Taint {
	if key == "" {
		key = "kiam.example.com/agent-not-ready"
	}
	return corev1.Taint{Key: key, Effect: effect}
}

// node is a worker with taints, but for what change makes of it.
func node(change func(*corev1.Node), taints ...corev1.Taint) *corev1.Node {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{"zone": "a"}},
		Spec:       corev1.NodeSpec{ProviderID: "aws:///a/i-1", PodCIDR: "10.0.0.0/24", Taints: taints},
	}
	if change != nil {
		change(node)
	}
	return node
}

func TestTheAgentTakesTheStartupTaintOffItsOwnNodeAndDoesNoMore(t *testing.T) {
	ours, ends := taint("", corev1.TaintEffectNoSchedule), taint("", corev1.TaintEffectNoExecute)
	other := taint("dedicated", corev1.TaintEffectNoSchedule)
	added := metav1.NewTime(time.Unix(1_700_000_000, 0))
	dated := corev1.Taint{Key: "dedicated", Effect: corev1.TaintEffectNoExecute, TimeAdded: &added}
	tainted, plain := node(nil, ours, other), node(nil, other)
	here, managed := on("n1"), func(node *corev1.Node) {
		node.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kiam-agent"}}
	}
	requests := []request{
		{name: "the taint, of its node", allowed: true, old: tainted, new: plain, extra: here},
		{name: "with all its effects", allowed: true, old: node(nil, ours, ends), new: node(managed), extra: here},
		{name: "beside one with a date", allowed: true, old: node(nil, dated, ours), new: node(nil, dated), extra: here},
		{name: "nothing", allowed: true, old: plain, new: node(managed, other), extra: here},

		{name: "of another node", old: tainted, new: plain, extra: on("n2")},
		{name: "with a token of no pod", old: tainted, new: plain},
		{name: "with a token that says other things", old: tainted, new: plain,
			extra: map[string][]string{"authentication.kubernetes.io/pod-name": {"n1"}}},

		{name: "another's taint too", old: tainted, new: node(nil), extra: here},
		{name: "another's taint alone", old: plain, new: node(nil), extra: here},
		{name: "one of its effects alone", old: node(nil, ours, ends), new: node(nil, ends), extra: here},
		{name: "a new taint", old: plain, new: node(nil, other, ends), extra: here},
		{name: "a taint changed", old: plain, new: node(nil, taint("dedicated", corev1.TaintEffectNoExecute)), extra: here},
		{name: "by its status", old: tainted, new: plain, extra: here, subresource: "status"},
		{name: "a new node", new: plain, extra: here},
	}
	for name, change := range map[string]func(*corev1.Node){
		"a label":         func(node *corev1.Node) { node.Labels["zone"] = "b" },
		"no labels":       func(node *corev1.Node) { node.Labels = nil },
		"an annotation":   func(node *corev1.Node) { node.Annotations = annotations{"a": "b"} },
		"a finalizer":     func(node *corev1.Node) { node.Finalizers = []string{"a/b"} },
		"an owner":        func(node *corev1.Node) { node.OwnerReferences = []metav1.OwnerReference{{Kind: "Pod", Name: "a", UID: "u"}} },
		"unschedulable":   func(node *corev1.Node) { node.Spec.Unschedulable = true },
		"the provider":    func(node *corev1.Node) { node.Spec.ProviderID = "aws:///a/i-2" },
		"the pods' range": func(node *corev1.Node) { node.Spec.PodCIDR = "10.0.1.0/24" },
		"more ranges":     func(node *corev1.Node) { node.Spec.PodCIDRs = []string{"10.0.0.0/24", "10.0.1.0/24"} },
	} {
		requests = append(requests, request{name: name, old: tainted, new: node(change, other), extra: here})
	}
	for i := range requests {
		requests[i].user = agent
	}
	requests = append(requests, request{name: "by somebody else", allowed: true, old: tainted, new: node(nil)})
	check(t, plugin(t, nodeRules, requests[4].of(t, nodes)), nodes, requests)
}

// of is what the plugin is told of the request.
func (request request) of(t *testing.T, resource schema.GroupVersionResource) admission.Attributes {
	kinds, _, err := scheme.Scheme.ObjectKinds(request.new)
	must(t, err)
	object, err := meta.Accessor(request.new)
	must(t, err)
	operation := admission.Create
	if request.old != nil {
		operation = admission.Update
	}
	name := request.user
	if name == "" {
		name = "somebody"
	}
	return admission.NewAttributesRecord(request.new, request.old, kinds[0], object.GetNamespace(), object.GetName(),
		resource, request.subresource, operation, nil, false,
		&user.DefaultInfo{Name: name, Groups: request.groups, Extra: request.extra})
}

func check(t *testing.T, plugin *validating.Plugin, resource schema.GroupVersionResource, requests []request) {
	for _, request := range requests {
		t.Run(request.name, func(t *testing.T) {
			err := plugin.Validate(t.Context(), request.of(t, resource), admission.NewObjectInterfacesFromScheme(scheme.Scheme))
			if (err == nil) != request.allowed {
				t.Errorf("allowed: %v, want %v: %v", err == nil, request.allowed, err)
			}
			// A rule that can't be evaluated denies as well, with words that say nothing to who asked.
			if err != nil && strings.Contains(err.Error(), "resulted in error") {
				t.Errorf("a rule failed instead of deciding: %v", err)
			}
		})
	}
}

// nobody is an authorizer that no policy here asks.
type nobody struct{}

func (nobody) Authorize(context.Context, authorizer.Attributes) (authorizer.Decision, string, error) {
	return authorizer.DecisionDeny, "", nil
}

// plugin is the API server's, with the policies and bindings of the folder, in a cluster with these objects. The policies
// are there once they refuse what is bad.
func plugin(t *testing.T, folder string, bad admission.Attributes, objects ...runtime.Object) *validating.Plugin {
	empty := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "empty"}}
	objects = append(append(policies(t, folder), namespace(nil), empty), objects...)
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
	// It knows the policies a moment after the caches do.
	for range 100 {
		if plugin.Validate(t.Context(), bad, admission.NewObjectInterfacesFromScheme(scheme.Scheme)) != nil {
			return plugin
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the policies refuse nothing")
	return nil
}

func policies(t *testing.T, folder string) (objects []runtime.Object) {
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
