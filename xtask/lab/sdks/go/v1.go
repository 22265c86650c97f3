// Command v1 is what programs with the AWS SDK for Go, version 1, do to be somebody: one signed request to $ENDPOINT.
package main

import (
	"log"
	"os"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/ec2metadata"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"
)

func main() {
	session := session.Must(session.NewSession())
	config := aws.NewConfig().WithEndpoint(os.Getenv("ENDPOINT"))
	if os.Getenv("AWS_REGION") == "" {
		region, err := ec2metadata.New(session).Region()
		if err != nil {
			log.Fatal(err)
		}
		config = config.WithRegion(region)
	}
	if _, err := sts.New(session, config).GetCallerIdentity(&sts.GetCallerIdentityInput{}); err != nil {
		log.Fatal(err)
	}
}
