import com.amazonaws.client.builder.AwsClientBuilder.EndpointConfiguration;
import com.amazonaws.regions.DefaultAwsRegionProviderChain;
import com.amazonaws.services.securitytoken.AWSSecurityTokenServiceClientBuilder;
import com.amazonaws.services.securitytoken.model.GetCallerIdentityRequest;

/** What programs with the AWS SDK for Java, version 1, do to be somebody: one signed request to $ENDPOINT. */
public class Client {
    public static void main(String[] arguments) {
        var region = new DefaultAwsRegionProviderChain().getRegion();
        var endpoint = new EndpointConfiguration(System.getenv("ENDPOINT"), region);
        var sts = AWSSecurityTokenServiceClientBuilder.standard().withEndpointConfiguration(endpoint).build();
        sts.getCallerIdentity(new GetCallerIdentityRequest());
        System.exit(0);
    }
}
