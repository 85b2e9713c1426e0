package etcdtest_test

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"example.com/etcdutil/etcdtest"
)

func ExampleNew() {
	cluster, err := etcdtest.New(3)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	if _, err := client.Put(context.Background(), "greeting", "hello"); err != nil {
		log.Fatal(err)
	}
	response, err := client.Get(context.Background(), "greeting")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s from %d members\n", response.Kvs[0].Value, len(cluster.Endpoints()))
	// Output: hello from 3 members
}

func ExampleNewWith() {
	cluster, err := etcdtest.NewWith(1, func(config *embed.Config) {
		config.QuotaBackendBytes = 1 << 20
	})
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = client.Put(context.Background(), "large", strings.Repeat("x", 1<<20))
	fmt.Println(err)
	// Output: etcdserver: mvcc: database space exceeded
}

func ExampleCluster_Restart() {
	cluster, err := etcdtest.New(1)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	if _, err := client.Put(context.Background(), "greeting", "hello"); err != nil {
		log.Fatal(err)
	}
	if err := cluster.Stop(0); err != nil {
		log.Fatal(err)
	}
	fmt.Println("stopped: leader", cluster.Leader())
	if err := cluster.Restart(0); err != nil {
		log.Fatal(err)
	}
	response, err := client.Get(context.Background(), "greeting")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("restarted: leader %d, %s\n", cluster.Leader(), response.Kvs[0].Value)
	// Output:
	// stopped: leader -1
	// restarted: leader 0, hello
}

func ExampleCluster_Isolate() {
	cluster, err := etcdtest.New(3)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	leader := cluster.Leader()
	if err := cluster.Isolate(leader); err != nil {
		log.Fatal(err)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{cluster.Endpoints()[(leader+1)%3]}, Logger: zap.NewNop(),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	// A member of the majority answers once it has elected another leader.
	if _, err := client.Get(context.Background(), "greeting"); err != nil {
		log.Fatal(err)
	}
	fmt.Println("another leads:", cluster.Leader() != leader)
	if err := cluster.Rejoin(leader); err != nil {
		log.Fatal(err)
	}
	// Output: another leads: true
}

func ExampleCluster_Restore() {
	cluster, err := etcdtest.New(1)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	if err := cluster.Backup(); err != nil {
		log.Fatal(err)
	}
	written, err := client.Put(context.Background(), "greeting", "hello")
	if err != nil {
		log.Fatal(err)
	}
	if err := cluster.Restore(); err != nil {
		log.Fatal(err)
	}
	response, err := client.Get(context.Background(), "greeting")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("keys:", response.Count)
	fmt.Println("revision gone backwards:", response.Header.Revision < written.Header.Revision)
	// Output:
	// keys: 0
	// revision gone backwards: true
}

func ExampleNewLink() {
	cluster, err := etcdtest.New(1)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	link, err := etcdtest.NewLink(cluster.Endpoints()[0])
	if err != nil {
		log.Fatal(err)
	}
	defer link.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	get := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := client.Get(ctx, "greeting")
		return err
	}
	fmt.Println("at first:", get())
	link.Cut()
	time.AfterFunc(100*time.Millisecond, link.Heal)
	fmt.Println("cut, then healed:", get())
	// Output:
	// at first: <nil>
	// cut, then healed: <nil>
}

func ExampleNewSecure() {
	cluster, err := etcdtest.NewSecure(1, etcdtest.Security{
		TLS: true,
		Users: []etcdtest.User{{
			Name:        "worker",
			Password:    "secret",
			Permissions: []etcdtest.Permission{{Type: clientv3.PermReadWrite, Key: "jobs/", Prefix: true}},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	config, err := cluster.ClientConfig("worker")
	if err != nil {
		log.Fatal(err)
	}
	client, err := clientv3.New(config)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = client.Put(context.Background(), "jobs/1", "print")
	fmt.Println("jobs/1:", err)
	_, err = client.Put(context.Background(), "users/1", "alice")
	fmt.Println("users/1:", err)
	// Output:
	// jobs/1: <nil>
	// users/1: etcdserver: permission denied
}

func ExampleNewProxy() {
	cluster, err := etcdtest.New(3)
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	proxy, err := etcdtest.NewProxy(cluster, "root")
	if err != nil {
		log.Fatal(err)
	}
	defer proxy.Close()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{proxy.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = client.Put(context.Background(), "greeting", "hello")
	fmt.Println(err)
	// Output: <nil>
}
